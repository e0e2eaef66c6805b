"""What must never change: the specification's figures, CLIP's own token ids, and the frozen tower."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch.testing import assert_close

from clip475.core.config import LabConfig
from clip475.core.devices import autocast_dtype, seed_everything
from clip475.core.files import LabError, error_message
from clip475.data.captions import CaptionSplit
from clip475.data.tokens import (
    _END,
    _build_clip_tokenizer,
    _builtin_text_folder,
    _read_bpe,
    clean_text,
    load_tokenizer,
    tokenize,
)
from clip475.models.freezing import audit_freeze, changed_tensors, freeze, snapshot
from clip475.models.joint import (
    _style_parameter_table,
    _weight_decay_groups,
    build_backbone,
    build_model,
    load_model,
    parameter_summary,
    parameter_table,
    save_model,
)
from clip475.models.tables import component_table
from clip475.models.text import (
    TextEncoder,
    _weights_fingerprint,
    caption_embeddings,
    encode_texts,
    known_token_share,
    load_text_encoder,
)

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared" / "data" / "clip_tokenizer"
TINY = LabConfig.from_preset("tiny", backbone="resnet10", image_size=32)
COCO = LabConfig.from_preset("coco")
CAPTIONS = [
    "a red boat",
    "two dogs left of a tree",
    "a man on a horse in the snow, at night",
    "boat",
    "a dog " * 60,
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder(TINY)


def real_ids(out):
    return [ids[mask > 0].tolist() for ids, mask in zip(out["input_ids"], out["attention_mask"])]


# ---- the parameters of the specification ----


@pytest.fixture(scope="module")
def specified():
    with torch.device("meta"):
        return build_model(COCO, pretrained=False)


def test_golden_parameter_counts(specified):
    s = parameter_summary(specified)
    assert (s["trainable"], s["frozen"], s["total"]) == (28_753_472, 63_428_096, 92_181_568)
    assert s["trainable"] == 23_508_032 + 5_245_440
    assert [(c["name"], c["parameters"], c["trainable"]) for c in s["components"]] == [
        ("backbone", 23_508_032, True),
        ("projection head", 5_245_440, True),
        ("text encoder", 63_428_096, False),
        ("logit scale", 1, True),
    ]
    assert json.loads(json.dumps(s)) == s


def test_golden_parts(specified):
    tower, head = specified.text_encoder.tower, specified.image_encoder.head
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(tower.text_model), count(tower.text_projection)) == (63_165_952, 262_144)
    assert (count(head[0]), count(head[2])) == (4_196_352, 1_049_088)


def test_counts_with_real_tensors_and_without_a_network(monkeypatch):
    import socket

    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert parameter_summary(build_model(COCO, pretrained=False))["total"] == 92_181_568


def test_table_and_its_style(specified):
    table = parameter_table(specified)
    assert table["parameters"].tolist() == [23_508_032, 5_245_440, 63_428_096, 1, 92_181_568]
    page = _style_parameter_table(table).to_html()
    assert (
        "92,181,568" in page
        and "○ frozen" in page
        and "● trainable" in page
        and "#CFE8F7" in page
        and "31.2%" in page
    )


def test_a_shared_parameter_counts_once_and_a_partly_frozen_part_says_so():
    model = build_model(TINY, pretrained=False)
    total = parameter_summary(model)["total"]
    model.image_encoder.head[2].bias = model.image_encoder.backbone.bn1.weight = torch.nn.Parameter(
        torch.zeros(512)
    )
    assert parameter_summary(model)["total"] == total - 64
    model.image_encoder.head[0].weight.requires_grad_(False)
    assert parameter_table(model).set_index("component").loc["projection head", "status"] == "partly frozen"


def test_weight_decay_spares_norms_biases_and_the_scale():
    model = build_model(TINY)
    decay, spared = _weight_decay_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decay["weight_decay"] == 0.05 and spared["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decay["params"])
    assert "logit_scale" in [names[id(p)] for p in spared["params"]]
    assert len(decay["params"]) + len(spared["params"]) == sum(p.requires_grad for p in model.parameters())


def test_initial_temperature():
    assert_close(build_model(TINY, pretrained=False).logit_scale.exp().item(), 1 / 0.07)
    assert_close(
        build_model(TINY.replace(init_temperature=0.5), pretrained=False).logit_scale.exp().item(), 2.0
    )


# ---- token ids ----


def test_our_golden_tokens(tokenizer):
    pairs = json.loads((HERE / "golden_tokens.json").read_text(encoding="utf-8"))
    assert len(pairs) >= 40
    got = real_ids(tokenize([p["text"] for p in pairs], tokenizer))
    assert [(p["text"], ids) for p, ids in zip(pairs, got) if ids != p["ids"]] == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="the golden vectors beside the project are not here")
def test_openai_golden_tokens(tokenizer):
    pairs = json.loads((SHARED / "golden_vectors.json").read_text(encoding="utf-8"))
    assert len(pairs) == 1612
    got = real_ids(tokenize([p["text"] for p in pairs], tokenizer))
    assert [(p["text"], ids) for p, ids in zip(pairs, got) if ids != p["ids"]] == []
    assert tokenizer.get_vocab() == json.loads((SHARED / "vocab.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def judge():
    "open_clip's own tokenizer, loaded from its file: the package itself takes seconds to import."
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip_torch is not installed")
    spec = importlib.util.spec_from_file_location(
        "open_clip_tokenizer", Path(spec.submodule_search_locations[0]) / "tokenizer.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def judged(judge, text):
    ids = [49_406, *judge.encode(text), 49_407]
    return ids if len(ids) <= 77 else ids[:76] + [49_407]


def test_the_judge_agrees_with_our_golden_tokens(judge):
    for p in json.loads((HERE / "golden_tokens.json").read_text(encoding="utf-8")):
        assert judged(judge, p["text"]) == p["ids"], p["text"]


LETTERS = st.characters(max_codepoint=0x2FFF, exclude_categories=("C", "M"))
PIECES = st.one_of(
    LETTERS,
    st.sampled_from(
        [
            "'s",
            "'t",
            "'ll",
            "&amp;",
            "&amp;amp;",
            "&lt;",
            "Ã©",
            "  ",
            "\n",
            "dog",
            "Boat",
            "360",
            "...",
            "🐶",
            "日本",
            "한국",
        ]
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_the_judge_agrees_on_odd_texts(judge, tokenizer, text):
    assert real_ids(tokenize(text, tokenizer)) == [judged(judge, text)]


def test_the_tokenizer_can_be_rebuilt(judge, tmp_path):
    _build_clip_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text(encoding="utf-8")) == json.loads(
            (_builtin_text_folder() / name).read_text(encoding="utf-8")
        ), name
    vocab, merges = _read_bpe()
    assert len(vocab) == 49_408 and len(merges) == 48_894 and vocab[_END] == 49_407


def test_shape_of_the_tokens(tokenizer):
    out = tokenize(CAPTIONS, tokenizer)
    assert (
        out["input_ids"].shape == out["attention_mask"].shape == (5, 77)
        and out["input_ids"].dtype == torch.int64
    )
    assert (out["input_ids"][:, 0] == 49_406).all() and (out["input_ids"][:, -1] == 49_407).all()
    assert tokenize(CAPTIONS[:2], tokenizer, padding="longest")["input_ids"].shape == (2, 8)
    assert tokenizer.model_max_length == 77 and tokenizer.pad_token_id == 49_407
    short = tokenize(CAPTIONS, tokenizer, context_length=5)["input_ids"]
    assert short.shape == (5, 5) and (short[:, -1] == 49_407).all()


def test_cleaning_refuses_what_is_no_text():
    for wrong in (None, 3, b"boat"):
        assert "is no text" in error_message("is no text", clean_text, wrong)


# ---- the text tower ----


def test_padded_and_trimmed_are_equal(encoder, tokenizer):
    assert_close(
        encoder(**tokenize(CAPTIONS[:4], tokenizer)),
        encoder(**tokenize(CAPTIONS[:4], tokenizer, padding="longest")),
        atol=1e-6,
        rtol=0,
    )


def test_padding_with_zeros_gives_the_same(encoder, tokenizer):
    out = tokenize(CAPTIONS[:4], tokenizer)
    zeros = torch.where(out["attention_mask"] > 0, out["input_ids"], 0)  # as OpenAI's code pads
    assert_close(encoder(zeros), encoder(**out), atol=1e-6, rtol=0)


def test_padded_and_trimmed_are_equal_in_the_specified_shape(tokenizer):
    seed_everything(0)
    tower = load_text_encoder(COCO, pretrained=False)
    assert_close(
        tower(**tokenize(CAPTIONS[:2], tokenizer)),
        tower(**tokenize(CAPTIONS[:2], tokenizer, padding="longest")),
        atol=1e-6,
        rtol=0,
    )


def test_unit_norms(encoder, tokenizer):
    model = build_model(TINY).eval()
    images, texts = model(torch.randn(3, 3, 32, 32), **tokenize(CAPTIONS, tokenizer))
    for x in (images, texts):
        assert_close(x.norm(dim=1), torch.ones(len(x)))
        assert x.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        half = model.encode_image(torch.randn(3, 3, 32, 32))
    assert half.dtype == torch.float32
    assert_close(half.norm(dim=1), torch.ones(3))


def test_position_zero_is_the_same_for_every_caption(encoder, tokenizer):
    hidden = encoder.tower(**tokenize(CAPTIONS, tokenizer)).last_hidden_state
    assert_close(hidden[:, 0], hidden[:1, 0].expand(len(CAPTIONS), -1))
    texts = encoder(**tokenize(CAPTIONS, tokenizer))
    assert (texts @ texts.T).fill_diagonal_(0).max() < 0.9999


@pytest.mark.parametrize("shape", ["builtin", "specified"])
def test_pooler_output_is_not_the_text_embedding(shape, encoder, tokenizer):
    tower = encoder if shape == "builtin" else load_text_encoder(COCO, pretrained=False)
    out = tokenize(CAPTIONS[:2], tokenizer, padding="longest")
    pooled = F.normalize(tower.tower.text_model(**out).pooler_output, dim=-1)
    assert pooled.shape != (2, 512) or not torch.allclose(pooled, tower(**out), atol=0.01)
    assert_close(
        F.normalize(tower.tower.text_projection(tower.tower.text_model(**out).pooler_output), dim=-1),
        tower(**out),
    )


def test_one_function_for_all_text(encoder, tokenizer):
    rows = encode_texts([*CAPTIONS, "A RED  boat ", CAPTIONS[3]], encoder, tokenizer, batch_size=2)
    assert_close(
        rows[:5], torch.cat([encoder(**tokenize(c, tokenizer)) for c in CAPTIONS]), atol=1e-6, rtol=0
    )
    assert torch.equal(rows[5], rows[0]) and torch.equal(rows[6], rows[3])
    assert torch.equal(
        encode_texts("a red boat", encoder, tokenizer), encode_texts(["a red boat"], encoder, tokenizer)
    )
    assert not rows.requires_grad and rows.dtype == torch.float32
    error_message("no caption", encode_texts, [], encoder, tokenizer)


def test_a_trainable_tower_trains_and_is_left_in_its_mode(tokenizer):
    tower = load_text_encoder(TINY, frozen=False).train()
    encode_texts(CAPTIONS, tower, tokenizer)
    assert tower.training
    tower(**tokenize(CAPTIONS, tokenizer)).sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


def test_the_builtin_folder_is_read_by_transformers_alone():
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    tower, info = CLIPTextModelWithProjection.from_pretrained(
        _builtin_text_folder(), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (
        tower.config.eos_token_id == 49_407
        and tower.config.projection_dim == 512
        and tower.config.max_position_embeddings == 77
    )
    assert AutoTokenizer.from_pretrained(_builtin_text_folder())("a red boat")["input_ids"] == [
        49_406,
        320,
        736,
        4440,
        49_407,
    ]
    assert {p.name for p in _builtin_text_folder().iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE.openai-clip",
        "model.safetensors",
    }


def test_known_words(tokenizer):
    blank = load_text_encoder(TINY, pretrained=False)
    blank.tower.get_input_embeddings().weight[tokenizer("boat", add_special_tokens=False)["input_ids"]] = 0
    assert known_token_share(["a red boat", "Boat!", "boat"], tokenizer, blank) == (3 / 6, ["boat"])
    assert known_token_share([""], tokenizer, blank) == (0, [])


# ---- what loading refuses ----


@pytest.fixture
def tower_folder(tmp_path):
    load_text_encoder(TINY, pretrained=False).tower.save_pretrained(tmp_path / "tower")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tower" / name).write_bytes((_builtin_text_folder() / name).read_bytes())
    return tmp_path / "tower"


def test_a_folder_is_a_text_model(tower_folder, tokenizer):
    config = TINY.replace(text_model=str(tower_folder))
    assert _weights_fingerprint(load_text_encoder(config).tower) != _weights_fingerprint(
        load_text_encoder(TINY).tower
    )
    assert load_tokenizer(str(tower_folder)).get_vocab() == tokenizer.get_vocab()
    assert load_text_encoder(config, pretrained=False).embedding_dim == 512


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "no weights", "no config", "config is no JSON", "no projection", "other width"]
)
def test_a_broken_tower_folder(tower_folder, damage):
    weights, settings_ = tower_folder / "model.safetensors", tower_folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "empty":
        weights.write_bytes(b"")
    if damage == "no weights":
        weights.unlink()
    if damage == "no config":
        settings_.unlink()
    if damage == "config is no JSON":
        settings_.write_text("{")
    if damage == "no projection":
        from safetensors.torch import load_file, save_file

        save_file(
            {k: v for k, v in load_file(weights).items() if "projection" not in k}, weights, {"format": "pt"}
        )
    if damage == "other width":
        settings_.write_text(settings_.read_text().replace('"hidden_size": ', '"hidden_size": 1'))
    message = error_message("tower", load_text_encoder, TINY.replace(text_model=str(tower_folder)))
    assert "\n" not in message


@pytest.mark.parametrize("damage", ["missing", "no JSON", "two tokens"])
def test_a_broken_tokenizer(tower_folder, damage):
    file = tower_folder / "tokenizer.json"
    if damage == "missing":
        file.unlink()
    if damage == "no JSON":
        file.write_text("{")
    if damage == "two tokens":
        whole = json.loads(file.read_text(encoding="utf-8"))
        whole["model"].update(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
        whole["added_tokens"] = []
        file.write_text(json.dumps(whole), encoding="utf-8")
    assert "\n" not in error_message("token", load_tokenizer, str(tower_folder))


class Evil:
    "Pickled, it would create a file when it is loaded."

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (Path(self.file),))


def test_pickled_code_never_runs(tower_folder, tmp_path):
    touched = tmp_path / "touched"
    torch.save({"weight": Evil(touched)}, tmp_path / "evil.pth")
    with pytest.raises(LabError):
        build_backbone("resnet10", str(tmp_path / "evil.pth"))
    (tower_folder / "model.safetensors").unlink()
    torch.save({"text_projection.weight": Evil(touched)}, tower_folder / "pytorch_model.bin")
    with pytest.raises(LabError):
        load_text_encoder(TINY.replace(text_model=str(tower_folder)))
    assert not touched.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the trap itself works
    assert touched.exists()


def test_an_honest_bin_file_still_loads(tower_folder):
    from safetensors.torch import load_file

    state = load_file(tower_folder / "model.safetensors")
    (tower_folder / "model.safetensors").unlink()
    torch.save(state, tower_folder / "pytorch_model.bin")
    tower = load_text_encoder(TINY.replace(text_model=str(tower_folder))).tower
    assert torch.equal(tower.text_projection.weight, state["text_projection.weight"])


def test_half_precision_files_become_float32(tower_folder):
    config = TINY.replace(text_model=str(tower_folder))
    load_text_encoder(config).tower.half().save_pretrained(tower_folder)
    assert {p.dtype for p in load_text_encoder(config).parameters()} == {torch.float32}


def test_hub_names_want_a_pinned_commit():
    message = error_message(
        "pin a commit", load_text_encoder, TINY.replace(text_model="openai/clip-vit-base-patch32")
    )
    assert "builtin" in message
    error_message("no such folder", load_text_encoder, TINY.replace(text_model="some/where/else"))


def test_offline_hub_names_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("clip475.data.tokens._hub_problem", lambda *about: "it is away")
    config = TINY.replace(text_model="nobody/nothing", text_revision="0123abc")
    for wrong in (
        load_text_encoder,
        lambda c: load_text_encoder(c, pretrained=False),
        lambda c: load_tokenizer(c.text_model, c.text_revision),
    ):
        message = error_message("HF_HOME", wrong, config)
        assert "builtin" in message and "0123abc" in message and "\n" not in message


def test_widths_that_do_not_fit():
    error_message("embedding_dim", load_text_encoder, TINY.replace(embedding_dim=256))
    error_message("context_length", load_text_encoder, TINY.replace(context_length=78))


def test_backbones_and_their_weights(tmp_path):
    from safetensors.torch import save_file

    net, width = build_backbone("resnet18")
    state = {**net.state_dict(), "fc.weight": torch.zeros(1000, width), "fc.bias": torch.zeros(1000)}
    save_file(state, tmp_path / "r.safetensors")
    torch.save(
        {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "old.pth"
    )  # as before BatchNorm counted
    for file in ("r.safetensors", "old.pth"):
        assert torch.equal(build_backbone("resnet18", str(tmp_path / file))[0].conv1.weight, net.conv1.weight)
    error_message("do not fit resnet50", build_backbone, "resnet50", str(tmp_path / "r.safetensors"))
    torch.save([1, 2], tmp_path / "list.pth")
    error_message("cannot be read", build_backbone, "resnet18", str(tmp_path / "list.pth"))
    torch.save({"a": 1, 2: "b"}, tmp_path / "odd.pth")
    error_message("do not fit", build_backbone, "resnet18", str(tmp_path / "odd.pth"))
    error_message("IMAGENET1K_V2", build_backbone, "resnet50", "IMAGENET")
    error_message("choose one of", build_backbone, "resnet10", "IMAGENET1K_V1")
    error_message("choose one of", build_backbone, "vit_b_16")


# ---- the caption cache ----


def a_split(captions=tuple(CAPTIONS)):
    return CaptionSplit(
        "val", Path("."), [7, 9], [Path("7.jpg"), Path("9.jpg")], list(captions), [0, 0, 0, 1, 1]
    )


def test_the_cache_is_read_only_when_everything_agrees(encoder, tokenizer, tmp_path, monkeypatch):
    calls = []
    import clip475.models.text as text

    real = text.encode_texts
    monkeypatch.setattr(text, "encode_texts", lambda *a, **k: calls.append(1) or real(*a, **k))

    the_split = a_split()

    def embed(split=the_split, config=TINY, encoder=encoder):
        return caption_embeddings(split, config, encoder, tokenizer, tmp_path)

    first = embed()
    assert torch.equal(embed(), first) and len(calls) == 1
    embed(a_split(["other", *CAPTIONS[1:]]))
    embed(config=TINY.replace(context_length=20))
    embed(encoder=load_text_encoder(TINY, pretrained=False))
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 4
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(files[1].read_bytes())  # a sound file under another one's name
    embed()
    embed(a_split(["other", *CAPTIONS[1:]]))
    embed(config=TINY.replace(context_length=20))
    assert torch.equal(embed(), first) and torch.equal(
        first, encode_texts(CAPTIONS, encoder, tokenizer, dtype=autocast_dtype(TINY, torch.device("cpu")))
    )
    assert not list(tmp_path.glob(".part-*"))


def test_a_cache_whose_writing_fails_leaves_nothing(encoder, tokenizer, tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError):
        caption_embeddings(a_split(), TINY, encoder, tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- frozen ----


def steps(model, tokenizer, count=3):
    optimizer = torch.optim.AdamW(_weight_decay_groups(model, 0.1), lr=1e-2)
    for _ in range(count):
        model.train()
        images, texts = model(torch.randn(5, 3, 32, 32), **tokenize(CAPTIONS, tokenizer, padding="longest"))
        loss = F.cross_entropy(model.logit_scale.exp() * images @ texts.T, torch.arange(5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def test_the_frozen_tower_does_not_move_by_a_bit(tokenizer):
    seed_everything(0)
    model = build_model(TINY)
    before, mark = snapshot(model), _weights_fingerprint(model.text_encoder.tower)
    optimizer = steps(model, tokenizer)
    moved = changed_tensors(before, snapshot(model))
    assert (
        not [n for n in moved if n.startswith("text_encoder.")]
        and _weights_fingerprint(model.text_encoder.tower) == mark
    )
    still = [n for n in before if n.startswith("image_encoder.") and n not in moved]
    assert not still and "logit_scale" in moved
    assert all(p.grad is None for p in model.text_encoder.parameters()) and audit_freeze(model).empty
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    assert component_table(model)["optimizer"].iloc[:-1].sum() == state


def test_broken_freezes_are_found(tokenizer):
    model = build_model(TINY)
    model.text_encoder.tower.text_projection.requires_grad_(True)
    assert audit_freeze(model)["module"].tolist() == ["text_encoder"]
    freeze(model.text_encoder)
    model.image_encoder.head.requires_grad = False
    assert audit_freeze(model)["module"].tolist() == ["image_encoder.head"]
    del model.image_encoder.head.requires_grad
    model.image_encoder.backbone.requires_grad_(False)
    found = audit_freeze(model.train())
    norms = [
        n for n, m in model.image_encoder.backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)
    ]
    assert (
        found["module"].tolist() == ["image_encoder.backbone." + n for n in norms]
        and found["finding"].str.contains("drift").all()
    )
    before = snapshot(model.image_encoder.backbone)
    with torch.no_grad():
        model.encode_image(torch.randn(4, 3, 32, 32))
    drifted = changed_tensors(before, snapshot(model.image_encoder.backbone))
    assert drifted and all(
        n.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked") for n in drifted
    )
    freeze(model.image_encoder.backbone)
    assert audit_freeze(model).empty


def test_an_old_gradient_is_found():
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    assert audit_freeze(freeze(layer))["module"].tolist() == ["weight", "bias"]


# ---- save and load ----


def test_round_trip_is_bit_identical(tmp_path, tokenizer):
    seed_everything(0)
    model = build_model(TINY)
    steps(model, tokenizer, 1)
    again, config = load_model(save_model(model, TINY, tmp_path))
    assert (
        config == TINY
        and changed_tensors(snapshot(model), snapshot(again)) == []
        and not again.training
        and audit_freeze(again).empty
    )
    assert (tmp_path / "model.safetensors").stat().st_size < 25e6  # the frozen tower is not in it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("how", ["trained", "random"])
def test_a_tower_of_its_own_is_saved_too(tmp_path, how):
    model = build_model(TINY, pretrained=how == "trained")
    if how == "trained":
        model.text_encoder = TextEncoder(
            model.text_encoder.tower.requires_grad_(True), frozen=False, pretrained=True
        )
    for _ in range(2):  # and a second time, from what was loaded
        again, _ = load_model(save_model(model, TINY, tmp_path))
        assert changed_tensors(snapshot(model), snapshot(again)) == [] and again.text_encoder.frozen == (
            how == "random"
        )
        model = again


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    model = build_model(TINY)
    save_model(model, TINY, tmp_path)
    file, whole = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    for config in (TINY.replace(backbone="resnet18"), TINY.replace(head_hidden=8)):
        config.save(tmp_path / "config.json")
        assert "\n" not in error_message("do not fit config.json", load_model, tmp_path)
    TINY.save(tmp_path / "config.json")
    for content in (whole[:-1], whole[:100], b""):
        file.write_bytes(content)
        error_message("cut short or damaged", load_model, tmp_path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, file)
    error_message("save_model", load_model, tmp_path)
    model.text_encoder.tower.text_projection.weight.mul_(1.01)
    error_message("another text tower", load_model, save_model(model, TINY, tmp_path))
    file.unlink()
    error_message("no such file", load_model, tmp_path)
    (tmp_path / "config.json").unlink()
    error_message("config.json", load_model, tmp_path)


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    model = build_model(TINY)
    save_model(model, TINY, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError):
        save_model(model, TINY, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
