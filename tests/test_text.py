"""Text from caption to cache: cleaning, tokens, number types, the hub, and a cache file that belongs to its
split or is refused."""

import html
import json
import re
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.testing import assert_close

from clip475.core.config import LabConfig
from clip475.core.files import LabError, error_message, save_tensors
from clip475.data.captions import CaptionSplit
from clip475.data.tokens import (
    _builtin_text_folder,
    _describe_text,
    _token_lengths,
    clean_text,
    load_tokenizer,
    tokenize,
)
from clip475.models.text import _open_captions, caption_embeddings, encode_texts, load_text_encoder

TINY = LabConfig.from_preset("tiny")
COCO = LabConfig.from_preset("coco")
CAPTIONS = [
    "a red boat",
    "two dogs left of a tree",
    "A RED  boat",
    "a man on a horse in the snow, at night",
    "boat",
    "a dog " * 60,
]
VAL = Path(__file__).parents[2] / "shared/data/coco2014/annotations/captions_val2014.json"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder(TINY)


@pytest.fixture(scope="module")
def full_size():
    torch.manual_seed(0)
    return load_text_encoder(COCO, pretrained=False)


# ---- cleaning and tokens ----


def cleaned(text):
    "OpenAI's cleaning to the letter, ftfy for every text."
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        st.text(max_size=40),
        st.text(st.characters(max_codepoint=127), max_size=40),
        st.text(st.sampled_from("aZ &;#amplt\t\n\r\x0b\x0c\x1b[31m\x1c\x7f\x85\xa0é’\u2028"), max_size=40),
    )
)
def test_plain_ascii_needs_no_mending(text):
    assert clean_text(text) == cleaned(text)


def test_every_ascii_character_is_cleaned_as_before():
    for a in map(chr, range(128)):
        for text in (a, f"x{a}Y", f"{a}{a} z", f"b{a}\n"):
            assert clean_text(text) == cleaned(text), repr(text)


@pytest.fixture(scope="module")
def real_captions():
    if not VAL.is_file():
        pytest.skip("COCO's captions are not beside the project")
    return [a["caption"] for a in json.loads(VAL.read_text(encoding="utf-8"))["annotations"]][::20]


def test_real_captions(real_captions, tokenizer):
    assert [clean_text(c) for c in real_captions] == [cleaned(c) for c in real_captions]
    said = _describe_text(real_captions, tokenizer, COCO)
    assert said["truncated"] == f"0 of {len(real_captions):,} (0.00%)" and said[
        "tokens per caption"
    ].startswith("median 13")


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_our_rectangle_is_that_of_transformers(tokenizer, padding):
    ours = tokenize(CAPTIONS, tokenizer, 20, padding)
    theirs = tokenizer(
        [clean_text(c) for c in CAPTIONS],
        padding=padding,
        truncation=True,
        max_length=20,
        return_tensors="pt",
    )
    for part, tensor in ours.items():
        assert torch.equal(tensor, theirs[part]) and tensor.dtype == torch.int64


def test_portions_make_no_difference(tokenizer):
    from clip475.data.tokens import _token_ids

    texts = [clean_text(c) for c in CAPTIONS]
    for portion in (1, 4, 6):
        assert [i.tolist() for i in _token_ids(texts, tokenizer, 77, portion)] == [
            i.tolist() for i in _token_ids(texts, tokenizer)
        ]


def test_lengths_and_what_is_cut(tokenizer, capfd):
    assert _token_lengths(CAPTIONS, tokenizer).tolist() == [5, 8, 5, 13, 3, 122]
    assert _describe_text(CAPTIONS, tokenizer, TINY)["truncated"] == "1 of 6 (16.67%)"
    assert "2 of 6" in _describe_text(CAPTIONS, tokenizer, TINY.replace(context_length=12))["truncated"]
    error_message("padding", tokenize, CAPTIONS, tokenizer, padding="left")
    assert capfd.readouterr().err == ""


# ---- number types ----


@pytest.mark.parametrize("which", ["encoder", "full_size"])
def test_bf16_stays_close_to_fp32(which, tokenizer, request):
    tower = request.getfixturevalue(which)
    exact, half = (
        encode_texts(CAPTIONS[:5], tower, tokenizer, dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    assert_close(half.norm(dim=1), torch.ones(5))
    assert (exact * half).sum(1).min() >= 0.999


def test_float32_means_float32_also_under_autocast(encoder, tokenizer):
    exact = encode_texts(CAPTIONS, encoder, tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_texts(CAPTIONS, encoder, tokenizer), exact)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_cache_computes_as_the_configuration_says(encoder, tokenizer, tmp_path, precision, dtype):
    config = TINY.replace(precision=precision)
    rows = caption_embeddings(a_split(), config, encoder, tokenizer, tmp_path)
    assert torch.equal(rows, encode_texts(CAPTIONS, encoder, tokenizer, dtype=dtype))
    assert manifest_of(next(tmp_path.iterdir()))["dtype"] == str(dtype).split(".")[1]


# ---- modes, whatever happens ----


def modes(module):
    return [m.training for m in module.modules()]


def test_modes_come_back_also_after_an_error(tokenizer, monkeypatch):
    tower = load_text_encoder(TINY, pretrained=False, frozen=False).train()
    tower.tower.text_projection.eval()  # a tower that is frozen in part
    before = modes(tower)
    assert len(set(before)) == 2
    encode_texts(CAPTIONS, tower, tokenizer)
    assert modes(tower) == before

    def fails(*args, **kwargs):
        assert not any(modes(tower))
        raise KeyboardInterrupt

    monkeypatch.setattr(tower, "forward", fails)
    with pytest.raises(KeyboardInterrupt):
        encode_texts(CAPTIONS, tower, tokenizer)
    assert modes(tower) == before


# ---- the hub is asked only for what is not here ----

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    "A folder as the hub's library keeps it, with one model that only we know."
    snapshot = tmp_path / "hub/models--nobody--tower/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in _builtin_text_folder().iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_what_is_in_the_cache_never_asks_the_hub(hub_cache, monkeypatch, encoder):
    monkeypatch.setattr("clip475.data.tokens._hub_problem", lambda *about: pytest.fail("the hub was asked"))
    config = TINY.replace(text_model="nobody/tower", text_revision=COMMIT)
    assert len(load_tokenizer("nobody/tower", COMMIT)) == 49_408
    loaded = load_text_encoder(config)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), encoder.parameters()))
    load_text_encoder(config, pretrained=False)


def test_what_is_missing_asks_once(hub_cache, monkeypatch):
    asked = []
    monkeypatch.setattr("clip475.data.tokens._hub_problem", lambda *about: asked.append(1) or "it is away")
    (hub_cache / "model.safetensors").unlink()
    (hub_cache / "tokenizer.json").unlink()
    error_message("HF_HOME", load_text_encoder, TINY.replace(text_model="nobody/tower", text_revision=COMMIT))
    error_message("HF_HOME", load_tokenizer, "nobody/tower", COMMIT)
    assert len(asked) == 2


def test_an_answering_hub_is_used():
    from clip475.data.tokens import _from_here_or_hub

    tried = []

    def load(local_files_only):
        tried.append(local_files_only)
        if local_files_only:
            raise OSError("not here")
        return "from the hub"

    assert _from_here_or_hub(load, lambda: "") == "from the hub" and tried == [True, False]
    with pytest.raises(OSError, match="not here"):
        _from_here_or_hub(load, None)
    with pytest.raises(OSError, match="it is away"):
        _from_here_or_hub(load, lambda: "it is away")


# ---- the cache ----


def a_split(captions=tuple(CAPTIONS), ids=(7, 9), owner=(0, 0, 0, 1, 1, 1), name="val"):
    return CaptionSplit(
        name, Path("."), list(ids), [Path(f"{i}.jpg") for i in ids], list(captions), list(owner)
    )


def manifest_of(file):
    with safe_open(file, "pt") as f:
        return json.loads(f.metadata()["manifest"])


@pytest.fixture
def cache(encoder, tokenizer, tmp_path):
    rows = caption_embeddings(a_split(), TINY, encoder, tokenizer, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    return file, rows


def content_of(file):
    with safe_open(file, "pt") as f:
        return {k: f.get_tensor(k).clone() for k in f.keys()}, f.metadata()


def refused(text, file, encoder, tokenizer, split=None, config=TINY):
    message = error_message(text, _open_captions, file, split or a_split(), config, encoder, tokenizer)
    assert "clip475 prepare … --rebuild" in message and str(file) in message and "\n" not in message


def test_a_sound_file_opens(cache, encoder, tokenizer):
    file, rows = cache
    assert torch.equal(_open_captions(file, a_split(), TINY, encoder, tokenizer), rows)
    assert torch.equal(_open_captions(file, a_split(), TINY), rows)
    tensors, _ = content_of(file)
    assert tensors["image_ids"].tolist() == [7, 7, 7, 9, 9, 9] and tensors["caption_image"].tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]


FIELDS = [
    "captions",
    "split",
    "context_length",
    "text_model",
    "text_revision",
    "weights",
    "tokenizer",
    "cleaning",
    "dtype",
    "library",
]


def test_these_are_all_fields(cache):
    assert list(manifest_of(cache[0])) == FIELDS


@pytest.mark.parametrize("field", [*FIELDS, "unknown"])
def test_every_flipped_field_is_named(cache, encoder, tokenizer, field):
    file, rows = cache
    tensors, meta = content_of(file)
    whole = json.loads(meta["manifest"])
    save_tensors(file, tensors, {**meta, "manifest": json.dumps({**whole, field: "other"})})
    refused(repr(field), file, encoder, tokenizer)
    if field in whole:
        save_tensors(
            file,
            tensors,
            {
                **meta,
                "manifest": json.dumps(
                    {k: v for k, v in whole.items() if k != field}
                    | ({field: 1} if whole[field] is None else {})
                ),
            },
        )
        refused(repr(field), file, encoder, tokenizer)
    assert torch.equal(
        caption_embeddings(a_split(), TINY, encoder, tokenizer, file.parent), rows
    )  # made anew
    assert torch.equal(_open_captions(file, a_split(), TINY, encoder, tokenizer), rows)


def test_what_changed_in_the_run_is_named(cache, encoder, tokenizer, monkeypatch):
    file, _ = cache
    refused("captions", file, encoder, tokenizer, a_split(CAPTIONS[::-1]))
    refused("split", file, encoder, tokenizer, a_split(ids=(7, 8)))
    refused("split", file, encoder, tokenizer, a_split(name="train"))
    refused("split", file, encoder, tokenizer, a_split(owner=(0, 0, 1, 1, 1, 1)))
    refused("weights", file, load_text_encoder(TINY, pretrained=False), tokenizer)
    refused("context_length", file, encoder, tokenizer, config=TINY.replace(context_length=20))
    other = "fp32" if manifest_of(file)["dtype"] == "bfloat16" else "bf16"
    refused("dtype", file, encoder, tokenizer, config=TINY.replace(precision=other))
    monkeypatch.setattr("clip475.models.text.__version__", "9.9")
    refused("library", file, encoder, tokenizer)


@pytest.mark.parametrize(
    "damage",
    [
        "embeddings permuted",
        "ids permuted",
        "rows permuted",
        "a row less",
        "one left out",
        "one more",
        "half",
    ],
)
def test_numbers_that_moved_are_refused(cache, encoder, tokenizer, damage):
    file, rows = cache
    tensors, meta = content_of(file)
    name = {"embeddings": "embeddings", "ids": "image_ids", "rows": "caption_image"}.get(damage.split()[0])
    if name:
        tensors[name] = tensors[name].flip(0)
    if damage == "a row less":
        tensors["embeddings"] = tensors["embeddings"][:-1]
    if damage == "one left out":
        del tensors["image_ids"]
    if damage == "one more":
        tensors["more"] = torch.ones(1)
    if damage == "half":
        tensors["embeddings"] = tensors["embeddings"].half().float()
    save_tensors(file, tensors, meta)
    refused("content", file, encoder, tokenizer)
    if damage in (
        "ids permuted",
        "rows permuted",
        "a row less",
    ):  # and by someone who made a new fingerprint too
        from clip475.models.text import _content_fingerprint

        save_tensors(file, tensors, {**meta, "content": _content_fingerprint(tensors)})
        refused(name or "embeddings", file, encoder, tokenizer)
    assert torch.equal(caption_embeddings(a_split(), TINY, encoder, tokenizer, file.parent), rows)


def test_a_cut_file_is_refused(cache, encoder, tokenizer):
    file, rows = cache
    whole = file.read_bytes()
    for length in (0, 4, 9, 300, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused("no whole file", file, encoder, tokenizer)
    save_tensors(file, content_of_bytes(whole))  # no metadata at all
    refused("no whole file", file, encoder, tokenizer)
    file.unlink()
    refused("no such file", file, encoder, tokenizer)
    file.mkdir()
    refused("no whole file", file, encoder, tokenizer)


def content_of_bytes(content):
    from safetensors.torch import load

    return load(content)


@settings(deadline=None, max_examples=12)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_is_believed(where, bit, encoder, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    rows = caption_embeddings(a_split(), TINY, encoder, tokenizer, folder)
    (file,) = folder.iterdir()
    damaged = bytearray(file.read_bytes())
    damaged[int(where * len(damaged))] ^= 1 << bit
    file.write_bytes(damaged)
    try:
        assert torch.equal(
            _open_captions(file, a_split(), TINY, encoder, tokenizer), rows
        )  # a space in the header, say
    except LabError:
        pass


def test_rebuild_computes_anew(encoder, tokenizer, tmp_path, monkeypatch):
    import clip475.models.text as text

    real, calls = text.encode_texts, []
    monkeypatch.setattr(text, "encode_texts", lambda *a, **k: calls.append(1) or real(*a, **k))
    for rebuild in (False, False, True, False):
        caption_embeddings(a_split(), TINY, encoder, tokenizer, tmp_path, rebuild=rebuild)
    assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_encoding_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    tower, done = load_text_encoder(TINY), []
    real = tower.forward

    def interrupted(**tokens):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(**tokens)

    many = a_split([f"a boat number {i}" for i in range(600)], owner=[0] * 300 + [1] * 300)
    monkeypatch.setattr(tower, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        caption_embeddings(many, TINY, tower, tokenizer, tmp_path / "cache")
    assert done and not (tmp_path / "cache").exists()
    monkeypatch.undo()
    rows = caption_embeddings(many, TINY, tower, tokenizer, tmp_path / "cache")
    assert torch.equal(rows, caption_embeddings(many, TINY, tower, tokenizer, tmp_path / "cache"))


def test_an_interrupted_writing_leaves_the_old_file(cache, encoder, tokenizer, monkeypatch):
    file, rows = cache
    before = file.read_bytes()

    def stopped(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"x" * 99)
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        caption_embeddings(a_split(), TINY, encoder, tokenizer, file.parent, rebuild=True)
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


def test_equal_captions_are_encoded_once(encoder, tokenizer, monkeypatch):
    seen, real = [], encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda **t: seen.append(len(t["input_ids"])) or real(**t))
    rows = encode_texts(["b", "a boat", "A  boat", "b", "a boat"], encoder, tokenizer)
    assert sum(seen) == 2 and torch.equal(rows[[0, 1, 1, 0, 1]], rows)


def test_the_order_of_rows_is_that_of_the_captions(encoder, tokenizer):
    generator = np.random.default_rng(0)
    words = ["red", "boat", "dog", "tree", "snow", "two"]
    captions = [" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(60)]
    rows = encode_texts(captions, encoder, tokenizer, batch_size=7)
    assert_close(rows, torch.cat([encode_texts(c, encoder, tokenizer) for c in captions]), atol=2e-6, rtol=0)
