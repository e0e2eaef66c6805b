"A tower and a model from the Hugging Face hub, played by a server on this machine that fails on demand."

import hashlib
import json
import shutil

import pytest
import torch
from hub_server import COMMIT, Hub
from huggingface_hub import constants
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from clip475.core.config import LabConfig
from clip475.core.files import LabError, _note_once, cache_dir
from clip475.data.download import _Patience
from clip475.data.tokens import _builtin_text_folder, load_tokenizer
from clip475.models import text
from clip475.models.text import load_text_encoder
from clip475.searching.model import ImageTextModel, load

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "nobody/tower"
CONFIG = LabConfig.from_preset("tiny", text_model=NAME, text_revision=COMMIT)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(_builtin_text_folder(), folder)
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "lab"))
    with Hub(folder) as server:
        server.point_here(monkeypatch, tmp_path / "cache")
        yield server
        server.shutdown()


def weights():
    return [p.clone() for p in load_text_encoder(CONFIG).parameters()]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def refusal(function, *args):
    with pytest.raises(LabError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def blob_of(hub, tmp_path, name):
    digest = hashlib.sha256((hub.folder / name).read_bytes()).hexdigest()
    return tmp_path / "cache" / "models--nobody--tower" / "blobs" / digest


def test_a_tower_comes_once_and_heals_when_its_bytes_change(hub, tmp_path, capsys):
    right = [p.clone() for p in load_text_encoder(LabConfig.from_preset("tiny")).parameters()]
    assert equal(weights(), right) and len(load_tokenizer(NAME, COMMIT)) == 49_408
    megabytes = (hub.folder / "model.safetensors").stat().st_size / 1e6
    assert f"{megabytes:,.0f} MB of weights are fetched once" in capsys.readouterr().err
    asked = hub.asked
    assert equal(weights(), right) and hub.asked == asked  # all of it is here
    blob = blob_of(hub, tmp_path, "model.safetensors")
    for place in (200_000, 0):  # in the numbers, and in the header
        with blob.open("r+b") as f:
            f.seek(place)
            f.write(bytes(16_384))
        _note_once.cache_clear()
        assert equal(weights(), right)
        assert "has changed since it was downloaded" in capsys.readouterr().err


def test_a_damaged_tower_without_a_network_is_refused_and_heals_later(hub, tmp_path):
    right = weights()
    with blob_of(hub, tmp_path, "model.safetensors").open("r+b") as f:
        f.seek(300_000)
        f.write(b"\x55" * 16_384)
    hub.status = 503
    assert "the hub answers 503" in refusal(load_text_encoder, CONFIG)
    hub.status = 200
    assert equal(weights(), right)


@pytest.mark.parametrize(
    "status, says", [(401, "private"), (404, "no such model"), (429, "wait"), (503, "503")]
)
def test_a_hub_that_refuses_is_one_sentence_and_is_asked_once(hub, tmp_path, status, says):
    hub.status = status
    message = refusal(load_text_encoder, CONFIG)
    assert f"the hub answers {status}" in message and says in message and "builtin" in message
    assert hub.asked < 12  # no minutes of trying again
    hub.status = 200
    assert weights()


def test_a_download_that_is_cut_leaves_nothing_that_passes_for_whole(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cut = "model.safetensors"
    assert "did not come from the hub" in refusal(load_text_encoder, CONFIG)
    assert not blob_of(hub, tmp_path, "model.safetensors").exists()
    hub.cut = ""
    right = load_text_encoder(LabConfig.from_preset("tiny")).parameters()
    assert equal(weights(), list(right))


def test_a_file_of_the_hub_that_is_no_tower(hub):
    (hub.folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "text_model" in refusal(load_text_encoder, CONFIG)


# ── the text half of a model with two towers ──


@pytest.fixture
def two_towers(hub, monkeypatch):
    "CLIP with the text tower that comes with the lab, as CLIP's own file holds it; its weights file."
    monkeypatch.setattr(text, "_PATIENCE", _Patience(tries=3, sleep=lambda seconds: None))
    shape = CLIPTextConfig.from_pretrained(hub.folder)
    vision = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8)
    clip = CLIPModel(CLIPConfig(text_config=shape.to_dict(), vision_config=vision, projection_dim=512))
    builtin = load_text_encoder(LabConfig.from_preset("tiny")).tower
    missing, unexpected = clip.load_state_dict(builtin.state_dict(), strict=False)
    assert missing and not unexpected
    clip.save_pretrained(hub.folder)
    return hub.folder / "model.safetensors"


def test_only_the_text_half_is_fetched_and_kept(hub, two_towers, tmp_path, monkeypatch, capsys):
    right = [p.clone() for p in load_text_encoder(LabConfig.from_preset("tiny")).parameters()]
    assert equal(weights(), right)
    share = hub.sent[two_towers.name] / two_towers.stat().st_size
    halves = [path for path in cache_dir().rglob("*.safetensors") if COMMIT in str(path)]
    assert len(halves) == 1 and halves[0].stat().st_size == pytest.approx(hub.sent[two_towers.name], rel=1e-3)
    assert share < 0.6 and "text half" in capsys.readouterr().err
    sent, asked = dict(hub.sent), hub.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert equal(weights(), right) and (hub.sent, hub.asked) == (sent, asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with halves[0].open("r+b") as f:
        f.seek(500_000)
        f.write(b"\x55" * 16_384)
    assert equal(weights(), right) and "has changed since" in capsys.readouterr().err


def test_a_text_half_that_is_cut_goes_on_where_it_was(hub, two_towers):
    right = load_text_encoder(LabConfig.from_preset("tiny")).parameters()
    hub.cut, hub.cuts = two_towers.name, 5
    assert equal(weights(), list(right))
    assert hub.sent[two_towers.name] < 0.6 * two_towers.stat().st_size


def test_a_server_of_whole_files_gives_the_whole_file(hub, two_towers, capsys):
    right = load_text_encoder(LabConfig.from_preset("tiny")).parameters()
    hub.ranges = False
    assert equal(weights(), list(right))
    assert "whole files only" in capsys.readouterr().err
    assert not list(cache_dir().rglob(f"*{COMMIT}*"))  # nothing half is kept


@pytest.mark.parametrize(
    "start", [b"", bytes(8), b"\xff" * 16, b"\x08" + bytes(7) + b'{"a": 1}', b"PK\3\4" * 9]
)
def test_a_two_tower_file_that_is_damaged_on_the_hub(hub, two_towers, start):
    two_towers.write_bytes(start)
    assert "did not come from the hub" in refusal(load_text_encoder, CONFIG)
    assert not list(cache_dir().rglob(f"*{COMMIT}*"))


# ── whole models ──


@pytest.fixture
def empty_hub(hub):
    shutil.rmtree(hub.folder)
    hub.folder.mkdir()
    return hub


def test_a_model_is_pushed_and_comes_back(empty_hub, save_random_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    model = load(save_random_run(tmp_path / "run"))
    assert model.push_to_hub(NAME) == f"{empty_hub.url}/{NAME}"
    assert {"README.md", "model.safetensors", "modeling_clip475.py"} <= set(empty_hub.files())
    (empty_hub.folder / "notes.bin").write_bytes(bytes(2**20))  # not the model's: not fetched
    for revision in (None, COMMIT):
        found = ImageTextModel.from_pretrained(NAME, revision=revision)
        assert found.encode_text("a red boat").equal(model.encode_text("a red boat"))
        assert found.config.text_model.endswith("text_tower")
    assert "notes.bin" not in empty_hub.sent and "modeling_clip475.py" not in empty_hub.sent
    asked = empty_hub.asked
    load(NAME, revision=COMMIT)
    assert empty_hub.asked == asked  # a commit that is here is not asked for
    empty_hub.status = 503
    assert (
        load(NAME).encode_text("a red boat").equal(model.encode_text("a red boat"))
    )  # the copy that is here


@pytest.mark.parametrize("status", [401, 503])
def test_a_model_that_does_not_come_is_one_sentence_and_heals(hub, save_random_run, tmp_path, status):
    run = save_random_run(tmp_path / "run")
    shutil.copytree(run, hub.folder, dirs_exist_ok=True)
    hub.status = status
    assert f"the hub answers {status}" in refusal(load, NAME)
    assert hub.asked < 12
    hub.status = 200
    assert load(NAME).config == load(run).config


def test_a_model_that_is_cut_or_changed_heals(hub, save_random_run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    run = save_random_run(tmp_path / "run")
    shutil.copytree(run, hub.folder, dirs_exist_ok=True)
    hub.cut = "model.safetensors"
    assert "did not come from the Hugging Face hub" in refusal(load, NAME)
    hub.cut = ""
    right = load(NAME).fingerprint
    with blob_of(hub, tmp_path, "model.safetensors").open("r+b") as f:
        f.seek(300_000)
        f.write(b"\x55" * 16_384)
    assert load(NAME, COMMIT).fingerprint == load(NAME).fingerprint == right == load(run).fingerprint


@pytest.mark.parametrize("status", [403, 503])
def test_a_push_that_is_refused_is_one_sentence(hub, save_random_run, tmp_path, monkeypatch, status):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    model = load(save_random_run(tmp_path / "run"))
    before = hub.files()
    hub.status = status
    message = refusal(model.push_to_hub, NAME)
    assert str(status) in message and "hf auth login" in message and hub.files() == before
