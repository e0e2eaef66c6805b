"""Recall@K against judges that share no code with it.

The main one reads the definition in exact arithmetic: embeddings of small whole numbers, cosines compared as fractions,
so that every tie is a tie. Small numbers make ties the rule, not the exception.
"""
import itertools, json, math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from clip475.core import LabError
from clip475.retrieval import chance_recall, cosine_blocks, evaluate_retrieval, ranks, recall_at_k, retrieval_table, search

COCO_LIKE = torch.arange(30).repeat_interleave(5 + torch.arange(30) % 3)  # (180,) 5, 6 or 7 captions an image


pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(noise=.8, dim=16, owner=COCO_LIKE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(int(owner.max()) + 1, dim, generator=generator), dim=-1)
    return images, F.normalize(images[owner] + noise * torch.randn(len(owner), dim, generator=generator) / dim**.5, dim=-1), owner


# the judge: whole numbers and fractions only

def closeness(query, item):
    "Orders items as their cosine with `query` does: sign(p)·p²/|item|², the query's own length being the same for all."
    p, length = sum(a*b for a, b in zip(query, item)), sum(b*b for b in item)
    return Fraction(p * abs(p), length) if length and any(query) else Fraction(0)


def judged_rank(query, gallery, right):
    scores = [closeness(query, item) for item in gallery]
    best = max(scores[j] for j in right)
    return 1 + sum(score >= best for j, score in enumerate(scores) if j not in right)


def judged_recalls(images, texts, owner, ks):
    i2t = [judged_rank(image, texts, {j for j, o in enumerate(owner) if o == i}) for i, image in enumerate(images)]
    t2i = [judged_rank(text, images, {o}) for text, o in zip(texts, owner)]
    return {"i2t": {f"R@{k}": sum(r <= k for r in i2t) / len(i2t) for k in ks}, "t2i": {f"R@{k}": sum(r <= k for r in t2i) / len(t2i) for k in ks}}


@st.composite
def galleries(draw):
    "Embeddings out of very few values, any number of captions an image (at least one), in any order."
    dim, most = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5]))
    vector = st.lists(st.integers(-most, most), min_size=dim, max_size=dim)
    images = draw(st.lists(vector, min_size=1, max_size=6))
    owner = draw(st.permutations(list(range(len(images))) + draw(st.lists(st.integers(0, len(images) - 1), max_size=12))))
    texts = draw(st.lists(vector, min_size=len(owner), max_size=len(owner)))
    return images, texts, owner


@settings(max_examples=300, deadline=None)
@given(galleries(), st.sampled_from([1, 3, 7, 10**6]))
def test_recall_is_the_definition_on_tied_data(gallery, block):
    images, texts, owner = gallery
    ks = (1, 2, 3, 5, 10, 50)
    metrics = evaluate_retrieval(torch.tensor(images).float(), torch.tensor(texts).float(), torch.tensor(owner), ks=ks, block=block)
    assert {way: metrics[way] for way in ("i2t", "t2i")} == judged_recalls(images, texts, owner, ks)


@settings(max_examples=200, deadline=None)
@given(galleries(), st.integers(1, 6))
def test_search_is_the_definition_on_tied_data(gallery, k):
    images, texts, _ = gallery
    k = min(k, len(images))
    scores, rows = search(torch.tensor(texts).float(), torch.tensor(images).float(), k)
    for text, found in zip(texts, rows.tolist()):
        assert found == sorted(range(len(images)), key=lambda j: (-closeness(text, images[j]), j))[:k]
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64 and (scores.diff(dim=1) <= 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.floats(0, 5), dim=st.sampled_from([8, 16, 64]))
def test_recall_of_real_numbers(seed, noise, dim):
    "Against NumPy's argsort; in so many dimensions no two cosines lie within 2⁻²⁴, where they would count as a tie."
    images, texts, owner = noisy(noise, dim, seed=seed)
    scores = images.double().numpy() @ texts.double().numpy().T  # (N, M)
    places, owners = np.argsort(-scores, axis=1, kind="stable"), owner.numpy()
    first = [int(np.argmax(owners[row] == i)) + 1 for i, row in enumerate(places)]
    back = [int(np.argmax(np.argsort(-scores[:, j], kind="stable") == o)) + 1 for j, o in enumerate(owners)]
    metrics = evaluate_retrieval(images, texts, owner)
    assert metrics["i2t"] == {f"R@{k}": float(np.mean(np.array(first) <= k)) for k in (1, 5, 10)}
    assert metrics["t2i"] == {f"R@{k}": float(np.mean(np.array(back) <= k)) for k in (1, 5, 10)}
    assert metrics["median_rank"] == {"i2t": np.median(first), "t2i": np.median(back)}


@pytest.mark.parametrize("copies", [1, 3, 50, 333])
@pytest.mark.parametrize("dim", [17, 512])
def test_copies_tie_exactly_wherever_they_stand(copies, dim):
    "Another image's word-for-word copies of the right caption all stand before it, in float32 as well as in half precision."
    generator = torch.Generator().manual_seed(copies)
    image, other = F.normalize(torch.randn(2, dim, generator=generator), dim=-1)
    caption = F.normalize(image + torch.randn(dim, generator=generator), dim=-1)
    owner = torch.ones(copies + 9, dtype=torch.long)
    owner[copies // 2] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        texts = caption.expand(copies + 9, -1).to(dtype)
        found = ranks(torch.stack([image, other]).to(dtype), texts, [0, 1], owner)
        assert found[0] == copies + 9 and found[1] == 2


def test_any_caption_counts_and_no_number_of_them_is_assumed():
    images = torch.eye(4)
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3])
    texts = -images[owner]               # every caption as wrong as can be,
    texts[torch.tensor([2, 3, 9, 10])] *= -1  # but one of each image
    metrics = evaluate_retrieval(images, texts, owner, ks=(1,))
    assert metrics["i2t"] == {"R@1": 1.0} and metrics["t2i"] == {"R@1": 4 / 12}


def test_a_model_that_knows_nothing_scores_nothing():
    for value in (0., 1.):
        metrics = evaluate_retrieval(torch.full((30, 8), value), torch.full((180, 8), value), COCO_LIKE)
        assert set(metrics["i2t"].values()) == set(metrics["t2i"].values()) == {0.0}


def test_what_must_not_matter():
    images, texts, owner = noisy()
    expected, order, rows = evaluate_retrieval(images, texts, owner), torch.randperm(len(texts)), torch.randperm(30)
    assert evaluate_retrieval(images, texts[order], owner[order]) == expected
    assert evaluate_retrieval(images[rows], texts, rows.argsort()[owner]) == expected
    assert evaluate_retrieval(images * 3, texts / 7, owner) == expected
    assert evaluate_retrieval(images.numpy(), texts.numpy(), owner.numpy()) == expected
    assert evaluate_retrieval(images.clone().requires_grad_(), texts, owner.to(torch.int32)) == expected
    frozen = owner.numpy()
    frozen.flags.writeable = False
    assert evaluate_retrieval(images, texts, frozen) == expected == json.loads(json.dumps(expected))


def test_blocks_bound_the_memory_and_change_nothing():
    images, texts, owner = noisy()
    for block in (1, 100, 180, 500, 10**9):
        slices = [scores for _, scores in cosine_blocks(images, texts, block)]
        assert max(s.numel() for s in slices) <= max(block, len(texts)) and sum(map(len, slices)) == 30
        assert evaluate_retrieval(images, texts, owner, block=block) == evaluate_retrieval(images, texts, owner)
        assert search(images, texts, 5, block=block)[1].equal(search(images, texts, 5)[1])


# chance

@pytest.mark.parametrize("size, right, k", [(g, c, k) for g in (1, 4, 7) for c in range(1, g + 1) for k in (1, 2, 5, 9)])
def test_chance_equals_counting_every_gallery(size, right, k):
    draws = list(itertools.combinations(range(size), min(k, size)))
    expected = Fraction(sum(any(item < right for item in draw) for draw in draws), len(draws))
    assert chance_recall([right], size, k) == float(expected)


def test_chance_of_coco_and_of_uneven_captions():
    metrics = evaluate_retrieval(*noisy())
    misses = [math.prod(Fraction(180 - c - i, 180 - i) for i in range(5)) for c in torch.bincount(COCO_LIKE).tolist()]
    assert metrics["chance"]["i2t"]["R@5"] == pytest.approx(float(1 - sum(misses) / 30), rel=1e-12)
    assert metrics["chance"]["t2i"] == {"R@1": 1 / 30, "R@5": 5 / 30, "R@10": 10 / 30}
    assert chance_recall([5] * 4000, 20_000, 1) == 1 / 4000
    assert chance_recall([5] * 40_504, 202_520, 10) == pytest.approx(10 / 40_504, rel=2e-3)


def test_guessing_scores_chance():
    found = torch.cat([ranks(torch.randn(30, 8, generator=g), torch.randn(180, 8, generator=g), range(30), COCO_LIKE) for g in map(torch.Generator().manual_seed, range(40))])
    for k in (1, 5, 20): assert recall_at_k(found, k) == pytest.approx(chance_recall(torch.bincount(COCO_LIKE).tolist(), 180, k), abs=.05)


# the table

def test_table_stands_beside_chance_and_ceiling():
    metrics = evaluate_retrieval(*noisy())
    table = retrieval_table({**metrics, "ceiling": {"i2t": metrics["i2t"], "t2i": metrics["t2i"]}, "seconds": 3})
    assert list(table.index) == ["image→text", "text→image"] and list(table["gallery"]) == ["180 captions", "30 images"]
    assert table.loc["text→image", "R@5 %"] == round(100 * metrics["t2i"]["R@5"], 1) == table.loc["text→image", "ceiling@5 %"].round(1)
    assert pd.api.types.is_numeric_dtype(table["chance@10 %"]) and table.loc["image→text", "chance@1 %"] == 3.33
    assert "ceiling@1 %" not in retrieval_table(metrics)


# bad input

def damaged(tensor, row, value):
    tensor = tensor.clone()
    tensor[row, 3] = value
    return tensor


I, T, C = noisy()


@pytest.mark.parametrize("args, text", [
    ((damaged(I, 7, math.nan), T, C), "image_embeddings: row 7 holds NaN"), ((I, damaged(T, 170, math.inf), C), "text_embeddings: row 170 holds NaN or infinity"),
    ((I[:, :8], T, C), "same model"), ((I, T, C[:-1]), "each of the 180 rows"), ((I, T[:-1], C), "each of the 179 rows"), ((I, T, C.float()), "whole number"),
    ((I[:-1], T, C), "caption 173 belongs to image row 29"), ((I, T, C - 1), "caption 0 belongs to image row -1"), ((I, T, C.clamp(max=28)), "image row 29 has no caption"),
    ((I[0], T, C), r"shape \(16,\)"), ((I[:0], T, C), r"shape \(0, 16\)"), ((I, T, C, (1, 0)), "at least 1"), ((I, T, C, (1.5,)), "at least 1")])
def test_evaluation_refuses(args, text):
    with pytest.raises(LabError, match=text): evaluate_retrieval(*args)


@pytest.mark.parametrize("args, text", [
    ((T, I, 31), "k of at most 30"), ((T, I, 0), "at least 1"), ((T[0], I, 5), r"x\[None\]"), ((T[:, :8], I, 5), "same model"), ((damaged(T, 0, math.nan), I, 5), "query_embeddings: row 0")])
def test_search_refuses(args, text):
    with pytest.raises(LabError, match=text): search(*args)


def test_ranks_refuse_a_question_without_an_answer():
    with pytest.raises(LabError, match="query 1 .label 99. has no right answer"): ranks(I[:2], I, [0, 99], range(30))
