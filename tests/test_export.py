"What transformers makes of the folder of a run."

import pytest
from transformers import AutoModel, CLIPModel, VisionTextDualEncoderModel

from clip475.core.config import LabConfig
from clip475.searching.model import load


@pytest.mark.parametrize("kind", [AutoModel, CLIPModel, VisionTextDualEncoderModel])
def test_transformers_does_not_take_a_run_for_a_model_of_its_own(kind, save_random_run, tmp_path):
    "It built a default model with random weights, and only warned of it."
    run = save_random_run(tmp_path / "run")
    with pytest.raises(Exception, match="clip475|pop"):
        kind.from_pretrained(run)
    assert load(run).config == LabConfig.from_preset("tiny")


def test_a_configuration_without_these_fields_is_read_as_before(tmp_path):
    "Runs of earlier versions, and files written by hand, have none of them."
    (tmp_path / "config.json").write_text('{"preset": "tiny", "epochs": 3}')
    assert LabConfig.load(tmp_path / "config.json") == LabConfig.from_preset("tiny", epochs=3)
    LabConfig.from_preset("tiny", epochs=3).save(tmp_path / "config.json")
    assert LabConfig.load(tmp_path / "config.json") == LabConfig.from_preset("tiny", epochs=3)
