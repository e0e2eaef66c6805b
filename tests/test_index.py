"""The search index: answers against a sort, the folder against its manifest, and one clear sentence for
each bad question."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.data.tokens import load_tokenizer
from clip475.evaluation.mistakes import (
    _better_elsewhere,
    _confident_mistakes,
    _hubs,
    _k_occurrence,
    _skewness,
    _worst_ranks,
    mistake_numbers,
)
from clip475.evaluation.retrieval import top_k
from clip475.models.joint import build_model
from clip475.models.text import load_text_encoder
from clip475.searching.index import (
    _MANIFEST,
    Encoder,
    SearchIndex,
    _combine,
    _leading_first,
    _model_encoder,
    _picture_of,
    _text_notes,
)

N, D = 40, 16
OWNER = torch.arange(N).repeat_interleave(5 + torch.arange(N) % 3)
OWNER = OWNER[torch.randperm(len(OWNER), generator=torch.Generator().manual_seed(3))]  # captions in no order


pytestmark = pytest.mark.usefixtures("one_thread")


def vectors(n, seed):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def words(texts):
    return torch.stack([vectors(1, sum(map(ord, text)))[0] for text in texts])


def colours(pictures):
    return torch.stack([vectors(1, int(np.asarray(p).mean() * 100))[0] for p in pictures])


ENCODER = Encoder(words, colours, fingerprint="m1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Pictures on disk and an index of them, saved."
    root = tmp_path_factory.mktemp("pictures")
    for i in range(N):
        Image.new("RGB", (20, 16), (i, 255 - i, 3 * i)).save(root / f"{i}.png")
    images = vectors(N, 1)
    texts = images[OWNER] + 2 * vectors(len(OWNER), 2)
    index = SearchIndex.build(
        images,
        [root / f"{i}.png" for i in range(N)],
        np.arange(N) * 7,
        texts,
        [f"caption {j}" for j in range(len(OWNER))],
        OWNER,
        {"split": "s1"},
        ENCODER,
    )
    return index.save(root / "index")


@pytest.fixture()
def index(folder):
    return SearchIndex.open(folder, encoder=ENCODER)


def test_what_was_built_is_what_is_opened(index, folder):
    images, texts = vectors(N, 1), vectors(N, 1)[OWNER] + 2 * vectors(len(OWNER), 2)
    torch.testing.assert_close(index.image_embeddings, F.normalize(images, dim=-1))
    rows = index.table["caption_row"].to_numpy().copy()
    torch.testing.assert_close(index.text_embeddings, F.normalize(texts, dim=-1)[rows])
    assert (
        (index.table["image_row"] == OWNER.numpy()[rows]).all()
        and (index.table["caption"] == [f"caption {j}" for j in rows]).all()
        and (index.table["image_id"] == index.table["image_row"] * 7).all()
    )
    for i in (0, 17, 39):
        assert index.captions_of(i) == [f"caption {j}" for j in (OWNER == i).nonzero().flatten().tolist()]
    assert isinstance(np.load(folder / "img_emb" / "img_emb_0.npy", mmap_mode="r"), np.memmap)


def test_the_layout_is_clip_retrievals(folder):
    """Row r of either array is described by row r of the table, in files of these names.

    Plain NumPy and pandas read them."""
    images, texts, table = (
        np.load(folder / "img_emb" / "img_emb_0.npy"),
        np.load(folder / "text_emb" / "text_emb_0.npy"),
        pd.read_json(folder / "metadata" / "metadata_0.jsonl", lines=True),
    )
    assert (
        images.dtype == texts.dtype == np.float32
        and len(table) == len(texts)
        and {"image_path", "caption"} <= set(table)
    )
    assert all(table["image_path"][r].endswith(f"/{r}.png") for r in range(len(images)))
    assert not list(folder.parent.glob(".part*"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=20).flatmap(lambda more: st.permutations(list(range(6)) + more)))
def test_leading_first_is_an_order(owner):
    order = _leading_first(owner, 6)
    assert sorted(order) == list(range(len(owner))) and [owner[j] for j in order[:6]] == list(range(6))


@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_answers_are_those_of_a_sort(folder, backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    index = SearchIndex.open(folder, encoder=ENCODER, backend=backend)
    for query in vectors(10, 9):
        for find, gallery in (("images", index.image_embeddings), ("captions", index.text_embeddings)):
            scores, rows = top_k(query[None], gallery, 7)
            found = index.search_text(query, 7, find)
            assert (
                found.rows == rows[0].tolist()
                and [i["score"] for i in found] == [round(s, 4) for s in scores[0].tolist()]
                and [i["rank"] for i in found] == list(range(1, 8))
            )


def test_ways_to_ask_agree(index):
    own = index.search_image(3, 5)
    assert 3 not in own.rows and index.search_image(index.image_embeddings[3], 6).rows == [3] + own.rows
    assert index.search_image(3, N - 1).rows == index.search_image(index.image_embeddings[3], N).rows[1:]
    path = index.path(8)
    with Image.open(path) as picture:
        by_picture = index.search_image(picture, 4)
    with open(path, "rb") as file:
        upload = file.read()
    assert (
        index.search_image(path, 4).rows
        == index.search_image(upload, 4).rows
        == by_picture.rows
        == index.search_image(colours([_picture_of(path)])[0], 4).rows
    )
    assert index.search_text("a boat", 4).rows == index.search_text(words(["a boat"])[0], 4).rows
    assert {item["image_row"] for item in index.search_image(3, 2, find="captions")} <= set(range(N))


def test_combine(index):
    a, b = vectors(2, 4)
    torch.testing.assert_close(_combine(a, [b], [b]), F.normalize(a, dim=0))
    torch.testing.assert_close(
        _combine(3 * a, [5 * b]), F.normalize(F.normalize(a, dim=0) + F.normalize(b, dim=0), dim=0)
    )
    assert _combine(a, [b] * 3, [a]).norm().item() == pytest.approx(1)
    assert index.like_but(5, k=6).rows == index.search_image(5, 6).rows
    assert index.like_but(5, plus="x", minus=["x"], k=6).rows == index.search_image(5, 6).rows
    assert (
        index.like_but(5, plus=["sea"] * 50, k=3).rows
        == [r for r in index.search_text("sea", 4).rows if r != 5][:3]
    )
    with pytest.raises(LabError, match="cancels out"):
        _combine(a, minus=[a])


def test_gallery_rows_draw(index):
    from clip475.core.figures import plot_gallery

    rows = [
        index.search_text("a boat", 3).gallery_row(),
        index.search_image(3, 3).gallery_row(hits=[True, False, True]),
        index.search_image(3, 3, find="captions").gallery_row(),
    ]
    assert (
        rows[0].query == "a boat"
        and isinstance(rows[1].query, Image.Image)
        and isinstance(rows[2].results[0], str)
    )
    plot_gallery(rows)
    assert (
        "note" not in index.search_text("a boat", 3).table()
        and len(index.search_image(3, 3, find="captions").table()) == 3
    )


# questions that have no answer


@pytest.mark.parametrize(
    "ask, text",
    [
        (lambda i: i.search_text(""), "the query is empty"),
        (lambda i: i.search_text(" \n"), "the query is empty"),
        (lambda i: i.search_text(None), "the query is empty"),
        (lambda i: i.search_text("a", N + 1), f"k is {N + 1}, and there are {N} images"),
        (lambda i: i.search_text("a", 0), "k is 0"),
        (lambda i: i.search_text("a", 2.5), "k is 2.5"),
        (lambda i: i.search_image(0, N), f"there are {N - 1} images"),
        (lambda i: i.search_image(N), f"rows go from 0 to {N - 1}"),
        (lambda i: i.search_image(-1), "rows go from 0"),
        (lambda i: i.search_text("a", find="videos"), "images"),
        (lambda i: i.search_text(torch.full((D,), torch.nan)), "holds NaN"),
        (lambda i: i.search_text(torch.ones(D + 1)), "another model"),
        (lambda i: i.search_image(b""), "0 bytes are no picture"),
        (lambda i: i.search_image(b"%PDF-1.7 ..."), "%PDF"),
        (lambda i: i.search_image("nowhere.jpg"), "nowhere.jpg"),
        (lambda i: i.search_image(__file__), "does not decode"),
    ],
)
def test_bad_questions(index, ask, text):
    with pytest.raises(LabError, match=text) as caught:
        ask(index)
    assert "\n" not in str(caught.value)


def test_strange_pictures(index):
    assert "only 1×1 pixels" in index.search_image(Image.new("L", (1, 1)), 1).note
    assert index.search_image(Image.new("RGBA", (30, 30)), 1).note == ""
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    with pytest.raises(LabError, match="no picture that decodes.*decompression bomb"):
        index.search_image(huge.getvalue())


def test_an_encoder_that_breaks_is_noticed(folder):
    index = SearchIndex.open(folder, encoder=Encoder(lambda texts: torch.full((1, D), torch.inf), None))
    with pytest.raises(LabError, match="NaN or infinity"):
        index.search_text("a")
    with pytest.raises(LabError, match="no encoder for pictures"):
        index.search_image(b"x")
    with pytest.raises(LabError, match="no encoder for texts"):
        SearchIndex.open(folder).search_text("a")


# folders that do not fit


def test_an_index_of_something_else_is_refused(folder, tmp_path):
    assert SearchIndex.open(folder, {"split": "s1", "model": "m1"}).manifest["images"] == N
    for expect in ({"split": "s2"}, {"model": "m2"}, {"size": 224}):
        with pytest.raises(LabError, match="build the index again"):
            SearchIndex.open(folder, expect)
    with pytest.raises(LabError, match="model 'm1' and 'm2'"):
        SearchIndex.open(folder, encoder=Encoder(words, fingerprint="m2"))
    with pytest.raises(LabError, match="no search index here"):
        SearchIndex.open(tmp_path)


@pytest.mark.parametrize("damage", ["shape", "cut", "lost", "table", "one bit", "swapped", "no checksums"])
def test_a_damaged_folder_is_refused(index, tmp_path, damage):
    folder = index.save(tmp_path / "index")
    file = folder / "img_emb" / "img_emb_0.npy"
    if damage == "shape":
        np.save(file, np.zeros((3, D), np.float32))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:300])
    if damage == "lost":
        file.unlink()
    if damage == "table":
        (folder / "metadata" / "metadata_0.jsonl").write_bytes(b"{")
    if damage == "one bit":
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    if damage == "swapped":
        np.save(file, index.image_embeddings.flip(0).numpy())
    if damage == "no checksums":
        manifest = json.loads((folder / _MANIFEST).read_text())
        del manifest["checksums"]
        (folder / _MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LabError, match="build"):
        SearchIndex.open(folder)


def test_saving_never_overwrites_by_accident(index, tmp_path):
    folder = index.save(tmp_path / "index")
    with pytest.raises(LabError, match="overwrite=True"):
        index.save(folder)
    index.save(folder, overwrite=True)
    manifest = json.loads((folder / _MANIFEST).read_text())
    assert len(manifest.pop("checksums")) == 3 and manifest == index.manifest
    (tmp_path / "photos").mkdir()
    with pytest.raises(LabError, match="not overwritten"):
        index.save(tmp_path / "photos", overwrite=True)


def test_build_refuses_what_does_not_fit():
    good = dict(
        image_embeddings=torch.eye(3),
        image_paths=list("abc"),
        image_ids=[1, 2, 3],
        text_embeddings=torch.eye(3),
        captions=list("xyz"),
        caption_image=[0, 1, 2],
    )
    SearchIndex.build(**good)
    for change, text in (
        (dict(image_paths=["a"]), "1 image_paths and 3"),
        (dict(captions=list("wxyz")), "4 captions and 3"),
        (dict(caption_image=[0, 0, 1]), "image row 2 has no caption"),
        (dict(text_embeddings=torch.ones(3, 2)), "same model"),
        (dict(image_embeddings=torch.full((3, 3), torch.nan)), "holds NaN"),
        (dict(backend="annoy"), "annoy"),
    ):
        with pytest.raises(LabError, match=text):
            SearchIndex.build(**{**good, **change})


def test_faiss_absent_is_said(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(LabError, match="pip install faiss-cpu"):
        SearchIndex.open(folder, backend="faiss")


# a real model


def test_what_the_tower_cannot_read_is_said():
    tower, tokenizer = load_text_encoder(LabConfig.from_preset("tiny")), load_tokenizer()
    note = lambda text, length=77: "; ".join(_text_notes(text, tokenizer, tower, length))
    assert note("a red boat") == "" and "has 502 tokens and the text tower reads 77" in note("boat " * 500)
    assert (
        "never seen zeppelin" in note("a red zeppelin")
        and "means nothing" in note("🚤🚤")
        and "means nothing" in note("ein rotes Schiff")
    )


def test_a_trained_models_encoder():
    torch.manual_seed(0)
    config = LabConfig.from_preset("tiny", precision="fp32")
    model = build_model(config).train()
    encoder = _model_encoder(model, config, load_tokenizer())
    pictures = [Image.new("RGB", (50, 30), c) for c in ("red", "blue")]
    assert (
        encoder.text(["a boat", "a dog"]).shape == encoder.image(pictures).shape == (2, config.embedding_dim)
    )
    torch.testing.assert_close(
        encoder.image(pictures)[:1], encoder.image(pictures[:1]), rtol=0, atol=1e-5
    )  # evaluation mode: no picture depends on the others
    before = encoder.fingerprint
    with torch.no_grad():
        next(model.image_encoder.parameters()).add_(1)
    assert _model_encoder(model, config, load_tokenizer()).fingerprint != before


# mistakes


def test_mistakes_follow_their_rules(index):
    scores = index.text_embeddings @ index.image_embeddings.T
    owner = torch.as_tensor(index.table["image_row"].to_numpy().copy())
    own = scores.gather(1, owner[:, None])
    rank = (scores > own).sum(1) + 1
    assert [
        f"[rank {r} of {N}]" in row.query
        for r, row in zip(rank.sort(descending=True).values.tolist(), _worst_ranks(index, n=4))
    ] == [True] * 4
    margin = (scores.amax(1) - own[:, 0]).max()
    first = _confident_mistakes(index, n=1)[0]
    assert first.scores[0] - first.scores[-1] == pytest.approx(margin.item(), abs=1e-5) and first.hits == [
        False
    ] * 4 + [True]
    for row in _better_elsewhere(index, n=3):
        assert row.scores[1] > row.scores[0] and row.hits == [True, False]
    counts = _k_occurrence(index, 5)
    assert (
        counts.equal(torch.bincount(scores.topk(5).indices.flatten(), minlength=N))
        and len(_hubs(index, n=3)) == 3
    )
    assert _skewness(counts) == pytest.approx(pd.Series(counts.numpy()).skew(), rel=0.1)


def test_a_perfect_model_makes_no_mistakes():
    perfect = SearchIndex.build(torch.eye(4), [""] * 4, range(4), torch.eye(4), list("abcd"), range(4))
    assert _confident_mistakes(perfect) == _better_elsewhere(perfect) == []
    assert mistake_numbers(perfect) == {
        "first_is_wrong": 0,
        "better_elsewhere": 0,
        "hub_skewness": 0,
        "anti_hubs": 0,
    }


def test_the_numbers_of_mistakes(index):
    scores = (index.text_embeddings @ index.image_embeddings.T).double()
    owner = torch.as_tensor(index.table["image_row"].to_numpy().copy())
    own = scores.gather(1, owner[:, None])[:, 0]
    best, other = scores.max(1)
    usual = torch.stack([own[owner == i].mean() for i in range(N)])
    found = mistake_numbers(index, 5)
    assert (
        found["first_is_wrong"] == (best > own).double().mean()
        and found["better_elsewhere"] == ((best > own) & (best > usual[other])).double().mean()
    )
    assert (
        found["anti_hubs"]
        == (torch.bincount(scores.topk(5).indices.flatten(), minlength=N) == 0).double().mean()
    )
    assert mistake_numbers(index)["hub_skewness"] == _skewness(_k_occurrence(index, min(10, N)))
