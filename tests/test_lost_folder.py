"""A drive that goes away while a run writes to it, as Colab's does, and a folder for the caches by option."""

import os

import pytest
import torch

from clip475.app.cli import _cache_in, main
from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.training.batches import prepare_data
from clip475.training.runs import fit


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    torch.set_num_threads(1)
    config = LabConfig.from_preset(
        "tiny", train_images=32, val_images=8, batch_size=16, epochs=3, image_size=32, checkpoint_steps=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP475_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield config, *prepare_data(config, progress=False)


def test_a_drive_that_goes_away_is_one_sentence_and_the_run_goes_on_when_it_is_back(prepared, tmp_path):
    config, train, val = prepared
    drive, away = tmp_path / "drive", tmp_path / "away"

    def unplug(state):
        if state.epoch == 1:
            drive.rename(away)

    with pytest.raises(LabError, match="has gone since training began.*--resume"):
        fit(config, train, val, drive / "run", watch=unplug, progress=False)
    assert not drive.exists()  # nothing was written in its place
    away.rename(drive)
    resumed = fit(config, train, val, drive / "run", resume=True, progress=False)
    unbroken = fit(config, train, val, tmp_path / "unbroken", progress=False)
    assert resumed.step == unbroken.step
    for name, weights in unbroken.model.state_dict().items():
        assert torch.equal(weights, resumed.model.state_dict()[name]), name


def test_a_checkpoint_whose_copy_was_cut_off_is_passed_over(prepared, tmp_path, capsys):
    config, train, val = prepared

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, train, val, tmp_path / "run", watch=stop, progress=False)
    newest = max((tmp_path / "run" / "checkpoint").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    state = fit(config, train, val, tmp_path / "run", resume=True, progress=False)
    assert state.epoch == config.epochs
    assert "this is not a whole checkpoint; going on from the one before" in capsys.readouterr().err


def test_the_option_cache_holds_for_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CLIP475_CACHE", raising=False)
    with _cache_in(str(tmp_path / "kept")):
        assert os.environ["CLIP475_CACHE"] == str(tmp_path / "kept")
    assert "CLIP475_CACHE" not in os.environ
    fields = ["--train", "16", "--val", "8", "--set", "batch_size=8", "--set", "image_size=32"]
    assert main(["prepare", *fields, "--cache", str(tmp_path / "kept")]) == 0
    assert any((tmp_path / "kept").rglob("*.npy"))
