"""Recall@K against judges that share no code with it.

The main one reads the definition in exact arithmetic: embeddings of small whole numbers, cosines compared
as fractions, so that every tie is a tie. Small numbers make ties the rule, not the exception."""

import itertools
import json
import math
import random
import re
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip475.core.files import LabError
from clip475.data.photos import load_photos
from clip475.evaluation.ranks import _cosine_blocks
from clip475.evaluation.retrieval import (
    _average_precision,
    _compare_retrieval,
    _extended_recall,
    _fold_recall,
    _recall_from_ranks,
    bootstrap_interval,
    caption_means,
    chance_recall,
    evaluate_retrieval,
    fit_linear_map,
    ranks,
    retrieval_table,
    top_k,
)

COCO_LIKE = torch.arange(30).repeat_interleave(5 + torch.arange(30) % 3)  # (180,) 5, 6 or 7 captions an image


pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(noise=0.8, dim=16, owner=COCO_LIKE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(int(owner.max()) + 1, dim, generator=generator), dim=-1)
    return (
        images,
        F.normalize(
            images[owner] + noise * torch.randn(len(owner), dim, generator=generator) / dim**0.5, dim=-1
        ),
        owner,
    )


# the judge: whole numbers and fractions only


def closeness(query, item):
    """Orders items as their cosine with `query` does.

    Sign(p)·p²/|item|², the query's own length being the same for all."""
    p, length = sum(a * b for a, b in zip(query, item)), sum(b * b for b in item)
    return Fraction(p * abs(p), length) if length and any(query) else Fraction(0)


def judged_rank(query, gallery, right):
    scores = [closeness(query, item) for item in gallery]
    best = max(scores[j] for j in right)
    return 1 + sum(score >= best for j, score in enumerate(scores) if j not in right)


def judged_precision(query, gallery, right):
    "AP@R as Musgrave et al. write it, right items last among ties."
    order = sorted(range(len(gallery)), key=lambda j: (-closeness(query, gallery[j]), j in right))[
        : len(right)
    ]
    hits = [j in right for j in order]
    return sum((Fraction(sum(hits[: i + 1]), i + 1) for i in range(len(hits)) if hits[i]), Fraction(0)) / len(
        right
    )


def judged_recalls(images, texts, owner, ks):
    i2t = [
        judged_rank(image, texts, {j for j, o in enumerate(owner) if o == i})
        for i, image in enumerate(images)
    ]
    t2i = [judged_rank(text, images, {o}) for text, o in zip(texts, owner)]
    return {
        "i2t": {f"R@{k}": sum(r <= k for r in i2t) / len(i2t) for k in ks},
        "t2i": {f"R@{k}": sum(r <= k for r in t2i) / len(t2i) for k in ks},
    }


@st.composite
def galleries(draw):
    "Embeddings out of very few values, any number of captions an image (at least one), in any order."
    dim, most = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5]))
    vector = st.lists(st.integers(-most, most), min_size=dim, max_size=dim)
    images = draw(st.lists(vector, min_size=1, max_size=6))
    owner = draw(
        st.permutations(
            list(range(len(images))) + draw(st.lists(st.integers(0, len(images) - 1), max_size=12))
        )
    )
    texts = draw(st.lists(vector, min_size=len(owner), max_size=len(owner)))
    return images, texts, owner


@settings(max_examples=300, deadline=None)
@given(galleries(), st.sampled_from([1, 3, 7, 10**6]))
def test_recall_is_the_definition_on_tied_data(gallery, block):
    images, texts, owner = gallery
    ks = (1, 2, 3, 5, 10, 50)
    metrics = evaluate_retrieval(
        torch.tensor(images).float(),
        torch.tensor(texts).float(),
        torch.tensor(owner),
        ks=ks,
        block=block,
        bootstrap=0,
    )
    assert {way: metrics[way] for way in ("i2t", "t2i")} == judged_recalls(images, texts, owner, ks)
    precision = [
        judged_precision(image, texts, {j for j, o in enumerate(owner) if o == i})
        for i, image in enumerate(images)
    ]
    assert metrics["map_at_r"]["i2t"] == pytest.approx(float(sum(precision) / len(images)), abs=1e-12)
    assert metrics["map_at_r"]["t2i"] == metrics["t2i"]["R@1"]


@settings(max_examples=200, deadline=None)
@given(galleries(), st.integers(1, 6))
def test_search_is_the_definition_on_tied_data(gallery, k):
    images, texts, _ = gallery
    k = min(k, len(images))
    scores, rows = top_k(torch.tensor(texts).float(), torch.tensor(images).float(), k)
    for text, found in zip(texts, rows.tolist()):
        assert found == sorted(range(len(images)), key=lambda j: (-closeness(text, images[j]), j))[:k]
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64 and (scores.diff(dim=1) <= 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.floats(0, 5), dim=st.sampled_from([8, 16, 64]))
def test_recall_of_real_numbers(seed, noise, dim):
    """Against NumPy's argsort.

    In so many dimensions no two cosines lie within 2⁻²⁴, where they would count as a tie."""
    images, texts, owner = noisy(noise, dim, seed=seed)
    scores = images.double().numpy() @ texts.double().numpy().T  # (N, M)
    places, owners = np.argsort(-scores, axis=1, kind="stable"), owner.numpy()
    first = [int(np.argmax(owners[row] == i)) + 1 for i, row in enumerate(places)]
    back = [int(np.argmax(np.argsort(-scores[:, j], kind="stable") == o)) + 1 for j, o in enumerate(owners)]
    metrics = evaluate_retrieval(images, texts, owner, bootstrap=0)
    assert metrics["i2t"] == {f"R@{k}": float(np.mean(np.array(first) <= k)) for k in (1, 5, 10)}
    assert metrics["t2i"] == {f"R@{k}": float(np.mean(np.array(back) <= k)) for k in (1, 5, 10)}
    assert metrics["median_rank"] == {"i2t": np.median(first), "t2i": np.median(back)}


@pytest.mark.parametrize("copies", [1, 3, 50, 333])
@pytest.mark.parametrize("dim", [17, 512])
def test_copies_tie_exactly_wherever_they_stand(copies, dim):
    """Another image's word-for-word copies of the right caption all stand before it, in float32 as well as
    in half precision."""
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
    texts = -images[owner]  # every caption as wrong as can be,
    texts[torch.tensor([2, 3, 9, 10])] *= -1  # but one of each image
    metrics = evaluate_retrieval(images, texts, owner, ks=(1,))
    assert metrics["i2t"] == {"R@1": 1.0} and metrics["t2i"] == {"R@1": 4 / 12}


def test_a_model_that_knows_nothing_scores_nothing():
    for value in (0.0, 1.0):
        metrics = evaluate_retrieval(torch.full((30, 8), value), torch.full((180, 8), value), COCO_LIKE)
        assert set(metrics["i2t"].values()) == set(metrics["t2i"].values()) == {0.0}


def test_what_must_not_matter():
    images, texts, owner = noisy()
    expected, order, rows = (
        evaluate_retrieval(images, texts, owner),
        torch.randperm(len(texts)),
        torch.randperm(30),
    )
    assert evaluate_retrieval(images, texts[order], owner[order]) == expected
    moved = evaluate_retrieval(
        images[rows], texts, rows.argsort()[owner]
    )  # the intervals draw other images then
    assert {**moved, "ci": 0} == {**expected, "ci": 0}
    assert evaluate_retrieval(images * 3, texts / 7, owner) == expected
    assert evaluate_retrieval(images.numpy(), texts.numpy(), owner.numpy()) == expected
    assert evaluate_retrieval(images.clone().requires_grad_(), texts, owner.to(torch.int32)) == expected
    frozen = owner.numpy()
    frozen.flags.writeable = False
    assert evaluate_retrieval(images, texts, frozen) == expected == json.loads(json.dumps(expected))


def test_blocks_bound_the_memory_and_change_nothing():
    images, texts, owner = noisy()
    for block in (1, 100, 180, 500, 10**9):
        slices = [scores for _, scores in _cosine_blocks(images, texts, block)]
        assert max(s.numel() for s in slices) <= max(block, len(texts)) and sum(map(len, slices)) == 30
        assert evaluate_retrieval(images, texts, owner, block=block) == evaluate_retrieval(
            images, texts, owner
        )
        assert top_k(images, texts, 5, block=block)[1].equal(top_k(images, texts, 5)[1])


# the quick way against the definition


def by_definition(query, gallery, query_labels, gallery_labels):
    "Ranks and AP@R from the whole float64 matrix on its grid, with a sort."
    scores = torch.cat([scores for _, scores in _cosine_blocks(query, gallery)]).double()
    right = query_labels[:, None] == gallery_labels
    rank = 1 + ((scores >= scores.masked_fill(~right, -2).amax(1, keepdim=True)) & ~right).sum(1)
    hits = right.gather(1, (scores * 2**25 - right.double()).argsort(dim=1, descending=True))
    at = torch.arange(1, hits.shape[1] + 1)
    precision = (hits.cumsum(1).double() / at * hits * (at <= right.sum(1, keepdim=True))).sum(1) / right.sum(
        1
    )
    return rank, precision


def crowd(kind, queries=150, items=1100, dim=512, seed=0):
    "Two sets whose scores are far apart, a few steps of 2⁻²⁴ apart, tied in groups, or all the same."
    generator = torch.Generator().manual_seed(seed)
    query, gallery = (
        torch.randn(queries, dim, generator=generator),
        torch.randn(items, dim, generator=generator),
    )
    if kind == "near":
        gallery = (
            gallery[:1]
            + 10 ** -torch.arange(2, 9).repeat_interleave(items // 7 + 1)[:items, None].double() * gallery
        )
    if kind == "tied":
        gallery = gallery[torch.arange(items) % 40]
    if kind == "half tied":
        gallery[::2] = gallery[0]
    if kind == "one":
        query, gallery = query[:1].expand(queries, -1), gallery[:1].expand(items, -1)
    return query, gallery


@pytest.mark.parametrize("block", [None, 2**14, 777])
@pytest.mark.parametrize("kind", ["random", "near", "tied", "half tied", "one"])
def test_quick_ranks_are_the_definitions(kind, block):
    query, gallery = crowd(kind)
    for many in (1100, 150, 7):  # right items a query: about 1, 7, and 157, where the bars come from blocks
        query_labels, gallery_labels = torch.arange(150) % min(many, 150), torch.arange(1100) % min(many, 150)
        rank, precision = by_definition(query, gallery, query_labels, gallery_labels)
        assert ranks(query, gallery, query_labels, gallery_labels, block).equal(rank)
        torch.testing.assert_close(
            _average_precision(query, gallery, query_labels, gallery_labels, block),
            precision,
            rtol=0,
            atol=1e-12,
        )


@pytest.mark.parametrize("kind", ["random", "near", "tied", "half tied", "one"])
def test_quick_search_is_the_definitions(kind):
    query, gallery = crowd(kind)
    everything = torch.cat([scores for _, scores in _cosine_blocks(query, gallery)]).sort(
        dim=1, descending=True, stable=True
    )
    for k, block in ((1, None), (10, 2**14), (33, 999), (1100, None)):
        scores, rows = top_k(query, gallery, k, block)
        assert rows.equal(everything.indices[:, :k]) and scores.equal(everything.values[:, :k])


def test_both_directions_count_the_same_matrix():
    for noise in (0.5, 3.0, 100.0):
        images, texts, owner = noisy(
            noise, dim=128, owner=torch.arange(333).repeat_interleave(5 + torch.arange(333) % 3)
        )
        rows = torch.arange(333)
        metrics = evaluate_retrieval(images, texts, owner, bootstrap=0)
        i2t, precision = by_definition(images, texts, rows, owner)
        t2i, _ = by_definition(texts, images, owner, rows)
        for way, found in (("i2t", i2t), ("t2i", t2i)):
            assert metrics[way] == {f"R@{k}": _recall_from_ranks(found, k) for k in (1, 5, 10)}
        assert metrics["map_at_r"]["i2t"] == pytest.approx(precision.mean().item(), abs=1e-12)


def test_quick_arithmetic_ignores_reduced_precision():
    "A user's bfloat16 settings would break the bound on the error; they are put aside, and put back."
    images, texts, owner = noisy(3.0, dim=256)
    expected = evaluate_retrieval(images, texts, owner)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert evaluate_retrieval(images, texts, owner) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# two more judges


def settled(images, texts, owner):
    """Scores as whole numbers, ties settled against the model beforehand.

    (N, M) float32, no right item equal to a wrong one."""
    scores = (
        torch.cat([scores for _, scores in _cosine_blocks(images, texts)]).double() * 2**25
        - (torch.arange(len(images))[:, None] == owner).double()
    )
    return scores.unique(return_inverse=True)[1].float()


def judged_sets():
    yield noisy(4.0, dim=64, owner=torch.arange(20).repeat_interleave(5 + torch.arange(20) % 3))
    images, texts, owner = noisy(0.5, dim=3, seed=2)
    yield (2 * images).round(), (2 * texts).round(), owner  # heavily tied


def test_torchmetrics_agrees():
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    for images, texts, owner in judged_sets():
        scores, right = settled(images, texts, owner), torch.arange(len(images))[:, None] == owner
        metrics = evaluate_retrieval(images, texts, owner, bootstrap=0)
        for way, s, r in (("i2t", scores, right), ("t2i", scores.T, right.T)):
            for k in (1, 10):
                assert metrics[way][f"R@{k}"] == sum(
                    functional.retrieval_hit_rate(a, b, top_k=k).item() for a, b in zip(s, r)
                ) / len(s)
            # its average precision is over the hits among the first R, ours over R:
            # the share of hits there is its recall
            found = [
                (
                    functional.retrieval_average_precision(a, b, top_k=n)
                    * functional.retrieval_recall(a, b, top_k=n)
                ).item()
                for a, b in zip(s, r)
                for n in [int(b.sum())]
            ]
            assert metrics["map_at_r"][way] == pytest.approx(np.mean(found), abs=1e-6)


def test_clip_benchmark_agrees():
    """On raw scores where none are tied, since its topk settles ties by position, and on tied data once the
    ties are settled."""
    judge = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval").recall_at_k
    for images, texts, owner in judged_sets():
        right, metrics = (
            torch.arange(len(images))[:, None] == owner,
            evaluate_retrieval(images, texts, owner, bootstrap=0),
        )
        raw = F.normalize(images.double(), dim=-1) @ F.normalize(texts.double(), dim=-1).T
        for scores in [settled(images, texts, owner)] + ([raw] if len(raw.unique()) == raw.numel() else []):
            for way, s, r in (("i2t", scores, right), ("t2i", scores.T, right.T)):
                for k in (1, 5, 10):
                    assert metrics[way][f"R@{k}"] == (judge(s, r.long(), k) > 0).double().mean().item()


# real captions: the package's photographs


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


@pytest.fixture(scope="module")
def bags():
    """Counts of words: whole numbers, so that ties are exact, and real ones (people wrote the same twice).

    An image is three words of one of its captions, drawn at random, since with all of them it would find
    each. Images have 5, 6 or 7 captions: sixth and seventh ones are the first two in other words."""
    photos, generator = load_photos(), random.Random(475)
    captions = [[words_of(text) for text in photo.captions] for photo in photos]
    captions = [own + [sorted(text, key=len)[:6] for text in own[: i % 3]] for i, own in enumerate(captions)]
    column = {word: i for i, word in enumerate(sorted({w for own in captions for text in own for w in text}))}

    def counts(texts):
        table = torch.zeros(len(texts), len(column), dtype=torch.int64)
        for row, text in zip(table, texts):
            for word in text:
                row[column[word]] += 1
        return table

    owner = torch.arange(len(photos)).repeat_interleave(torch.tensor([len(own) for own in captions]))
    texts = counts([text for own in captions for text in own])
    return counts([generator.sample(generator.choice(own[:5]), 3) for own in captions]), texts, owner


def exact_order(images, texts, right):
    """Scores (N, M) whose order is that of the cosines, ties settled against the model, from whole numbers
    alone: the square of a cosine is a fraction."""
    products = (images @ texts.T).numpy() ** 2
    lengths = [(table**2).sum(1).numpy() for table in (images, texts)]
    sizes = lengths[0][:, None] * lengths[1]
    shared = np.gcd(products, sizes)
    fractions, place = np.unique(
        np.stack([products // shared, sizes // shared]).reshape(2, -1), axis=1, return_inverse=True
    )
    values = (
        fractions[0] / fractions[1]
    )  # different fractions of so small numbers differ by far more than 2⁻⁵²
    assert np.unique(values).size == values.size < 2**22 and sizes.max() < 2**20
    order = torch.from_numpy(values.argsort().argsort()[place.reshape(sizes.shape)])
    return (2 * order - right.long()).float()


def test_recall_of_real_captions_is_that_of_three_judges(bags):
    images, texts, owner = bags
    right = torch.arange(len(images))[:, None] == owner
    assert set(right.sum(1).tolist()) >= {5, 6, 7}
    scores = exact_order(images, texts, right)
    metrics = evaluate_retrieval(images.float(), texts.float(), owner, bootstrap=0)
    hit_rate = pytest.importorskip("torchmetrics.functional.retrieval").retrieval_hit_rate
    benchmark = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval").recall_at_k
    for way, s, r in (("i2t", scores, right), ("t2i", scores.T, right.T)):
        order = [sorted(range(len(row)), key=lambda j: -row[j]) for row in s.tolist()]
        for k in (1, 5, 10):
            found = metrics[way][f"R@{k}"]
            assert 0.05 < found < 0.99
            assert found == sum(any(r[q, places[:k]]) for q, places in enumerate(order)) / len(s)
            assert found == (benchmark(s, r.long(), k) > 0).double().mean().item()
            if way == "i2t" or k == 1:  # a call for each query: 163 are enough for the other
                assert found == sum(hit_rate(a, b, top_k=k).item() for a, b in zip(s, r)) / len(s)
    best = (
        (scores + right).masked_fill(~right, -1).amax(1, keepdim=True)
    )  # a tie is equal once it is not settled
    assert ((scores == best) & ~right).any(1).sum() > 5


# right pairs from files, as ECCV Caption publishes them


def write_positives(folder, pairs):
    "Two files from N × M right pairs; images have the ids 7, 8, …, captions 500, 501, …"
    for name, table, first, other in (("i2t", pairs, 7, 500), ("t2i", pairs.T, 500, 7)):
        positives = {
            str(first + i): [other + int(j) for j in row.nonzero().flatten()] for i, row in enumerate(table)
        }
        (folder / f"{name}.json").write_text(json.dumps({key: own for key, own in positives.items() if own}))
    return folder / "i2t.json", folder / "t2i.json"


def test_right_pairs_of_a_file_are_counted_one_by_one(tmp_path):
    images, texts, owner = noisy(3.0, owner=torch.arange(20).repeat_interleave(5 + torch.arange(20) % 3))
    images, texts = (4 * images).round(), (4 * texts).round()  # many ties
    generator = torch.Generator().manual_seed(3)
    pairs = (torch.arange(20)[:, None] == owner) | (torch.rand(20, len(texts), generator=generator) < 0.05)
    pairs[4] = False  # an image that the file does not have
    files = write_positives(tmp_path, pairs)
    found = _extended_recall(images, texts, range(7, 27), range(500, 500 + len(texts)), *files)
    for way, queries, gallery, table in (("i2t", images, texts, pairs), ("t2i", texts, images, pairs.T)):
        ranks_found = [
            judged_rank(q, gallery.long().tolist(), set(own.nonzero().flatten().tolist()))
            for q, own in zip(queries.long().tolist(), table)
            if own.any()
        ]
        assert found["queries"][way] == len(ranks_found) == table.any(1).sum()
        assert found[way] == {
            f"R@{k}": sum(r <= k for r in ranks_found) / len(ranks_found) for k in (1, 5, 10)
        }
    assert found["queries"]["i2t"] == 19


def test_files_of_right_pairs_that_do_not_fit(tmp_path):
    images, texts, owner = noisy(owner=torch.arange(6).repeat_interleave(5))
    i2t, t2i = write_positives(tmp_path, torch.arange(6)[:, None] == owner)
    ids = range(7, 13), range(500, 530)
    same = _extended_recall(images, texts, *ids, i2t, t2i)
    assert same["i2t"] == evaluate_retrieval(images, texts, owner, bootstrap=0)["i2t"]
    for text in ('{"7": [500, "x"]}', '{"seven": [500]}', '{"7": ["5²"]}', '{"7": 500}', "[7, 500]"):
        i2t.write_text(text)
        with pytest.raises(LabError, match="has no list of ids"):
            _extended_recall(images, texts, *ids, i2t, t2i)
    i2t.write_text('{"7": [9999], "8": []}')
    with pytest.raises(LabError, match="check the ids"):
        _extended_recall(images, texts, *ids, i2t, t2i)
    with pytest.raises(LabError, match="an id of its own"):
        _extended_recall(images, texts, [7] * 6, ids[1], i2t, t2i)
    with pytest.raises(LabError, match="no such file"):
        _extended_recall(images, texts, *ids, tmp_path / "gone.json", t2i)


# intervals, folds, baselines


def test_interval_is_reproducible_ordered_and_over_images():
    found, owner = torch.tensor([1] * 30 + [9] * 30), torch.arange(60) // 3
    interval = bootstrap_interval(found, owner, ks=(1, 10))
    assert (
        interval
        == bootstrap_interval(found, owner, ks=(1, 10))
        != bootstrap_interval(found, owner, ks=(1, 10), seed=1)
    )
    assert interval["R@10"] == pytest.approx([0.025 ** (1 / 20), 1])  # all 20 images succeed
    nothing = bootstrap_interval(torch.full((60,), 99), owner, ks=(1,))["R@1"]
    assert nothing == pytest.approx([0, 1 - 0.025 ** (1 / 20)])
    assert interval["R@1"][0] < 0.5 < interval["R@1"][1]
    alone = bootstrap_interval(found[::3], owner[::3], ks=(1,))["R@1"]
    assert interval["R@1"] == alone  # three queries that succeed together are one
    spread = np.std(np.random.default_rng(0).binomial(20, 0.5, 10**5) / 20) * 1.96
    assert (alone[1] - alone[0]) / 2 == pytest.approx(spread, rel=0.15)
    assert bootstrap_interval(found, owner * 1000 + 7, ks=(1, 10)) == interval  # rows need not be dense


def test_folds():
    images, texts, owner = noisy(2.0, owner=torch.arange(23).repeat_interleave(5 + torch.arange(23) % 3))
    folds = _fold_recall(images, texts, owner, fold=10)
    parts = [
        evaluate_retrieval(
            images[a : a + 10],
            texts[(owner >= a) & (owner < a + 10)],
            owner[(owner >= a) & (owner < a + 10)] - a,
        )
        for a in (0, 10)
    ]
    assert (
        folds["t2i"]["R@1"] == (parts[0]["t2i"]["R@1"] + parts[1]["t2i"]["R@1"]) / 2
        and folds["folds"] == 2
        and folds["note"] == "3 images left over"
    )
    with pytest.raises(LabError, match="takes 1,000 images and here are 23"):
        _fold_recall(images, texts, owner)
    with pytest.raises(LabError, match="takes 5,000 images"):
        _fold_recall(images, texts, owner, fold="5k")
    with pytest.raises(LabError, match="at least 1"):
        _fold_recall(images, texts, owner, fold="10k")


def test_the_protocols_of_the_literature():
    images, texts, owner = noisy(1.0, dim=8, owner=torch.arange(2100).repeat_interleave(2))
    found = _fold_recall(images, texts, owner)
    assert (found["fold"], found["folds"]) == (1000, 2) and found[
        "note"
    ] == "2 of the 5 folds of the 1k protocol; 100 images left over"
    assert found["chance"]["t2i"]["R@10"] == 0.01


def test_linear_map_is_ridge_regression():
    "Against least squares on rows that spell the penalty out."
    generator = torch.Generator().manual_seed(0)
    features, targets = (
        torch.randn(40, 6, generator=generator).double() + 3,
        torch.randn(40, 3, generator=generator).double(),
    )
    found = fit_linear_map(features, targets, l2=0.5)
    x, y = features - features.mean(0), targets - targets.mean(0)
    penalty = (0.5 * (x**2).sum() / 6) ** 0.5
    expected = torch.linalg.lstsq(
        torch.cat([x, penalty * torch.eye(6)]), torch.cat([y, torch.zeros(6, 3)])
    ).solution
    torch.testing.assert_close(found.weight, expected)
    torch.testing.assert_close(found(features).norm(dim=1), torch.ones(40))
    constant = fit_linear_map(torch.ones(5, 2), targets[:5])  # nothing to learn from: the mean target
    torch.testing.assert_close(constant(torch.ones(1, 2))[0], F.normalize(targets[:5].mean(0), dim=0).float())


def test_baselines_stand_in_one_table():
    images, texts, owner = noisy()
    torch.testing.assert_close(caption_means(texts, owner, 30)[3], texts[owner == 3].mean(0))
    metrics = evaluate_retrieval(images, texts, owner)
    table = _compare_retrieval({"a": metrics, "b": metrics})
    assert (
        list(table.index) == ["chance", "a", "b"]
        and table.loc["chance", "text→image R@1"] == 3.33
        and table.loc["a", "image→text R@1"] == float(f"{100 * metrics['i2t']['R@1']:.3g}")
    )
    with pytest.raises(LabError, match="same split"):
        _compare_retrieval(
            {"a": metrics, "b": evaluate_retrieval(images[:9], texts[owner < 9], owner[owner < 9])}
        )


def test_small_chances_do_not_print_as_zero():
    metrics = {
        "i2t": {"R@1": 0.5},
        "t2i": {"R@1": 0.4},
        "images": 40504,
        "captions": 202654,
        "chance": {"i2t": {"R@1": 1 / 40504}, "t2i": {"R@1": 1 / 40504}},
    }
    for text in (
        retrieval_table(metrics).to_string(),
        retrieval_table(metrics).T.to_string(),
        retrieval_table(metrics).to_html(),
    ):
        assert "0.00247" in text


# chance


@pytest.mark.parametrize(
    "size, right, k", [(g, c, k) for g in (1, 4, 7) for c in range(1, g + 1) for k in (1, 2, 5, 9)]
)
def test_chance_equals_counting_every_gallery(size, right, k):
    draws = list(itertools.combinations(range(size), min(k, size)))
    expected = Fraction(sum(any(item < right for item in draw) for draw in draws), len(draws))
    assert chance_recall([right], size, k) == float(expected)


def test_chance_of_coco_and_of_uneven_captions():
    metrics = evaluate_retrieval(*noisy())
    misses = [
        math.prod(Fraction(180 - c - i, 180 - i) for i in range(5))
        for c in torch.bincount(COCO_LIKE).tolist()
    ]
    assert metrics["chance"]["i2t"]["R@5"] == pytest.approx(float(1 - sum(misses) / 30), rel=1e-12)
    assert metrics["chance"]["t2i"] == {"R@1": 1 / 30, "R@5": 5 / 30, "R@10": 10 / 30}
    assert chance_recall([5] * 4000, 20_000, 1) == 1 / 4000
    assert chance_recall([5] * 40_504, 202_520, 10) == pytest.approx(10 / 40_504, rel=2e-3)


def test_guessing_scores_chance():
    found = torch.cat(
        [
            ranks(torch.randn(30, 8, generator=g), torch.randn(180, 8, generator=g), range(30), COCO_LIKE)
            for g in map(torch.Generator().manual_seed, range(40))
        ]
    )
    for k in (1, 5, 20):
        assert _recall_from_ranks(found, k) == pytest.approx(
            chance_recall(torch.bincount(COCO_LIKE).tolist(), 180, k), abs=0.05
        )


# the table


def test_table_stands_beside_chance_and_ceiling():
    metrics = evaluate_retrieval(*noisy())
    table = retrieval_table(
        {**metrics, "ceiling": {"i2t": metrics["i2t"], "t2i": metrics["t2i"]}, "seconds": 3}
    )
    assert list(table.index) == ["image→text", "text→image"] and list(table["gallery"]) == [
        "180 captions",
        "30 images",
    ]
    assert (
        table.loc["text→image", "R@5 %"]
        == round(100 * metrics["t2i"]["R@5"], 1)
        == table.loc["text→image", "ceiling@5 %"].round(1)
    )
    assert (
        pd.api.types.is_numeric_dtype(table["chance@10 %"]) and table.loc["image→text", "chance@1 %"] == 3.33
    )
    assert "ceiling@1 %" not in retrieval_table(metrics)
    assert (
        table.loc["image→text", "95 %@1"]
        == "–".join(f"{100 * end:.1f}" for end in metrics["ci"]["i2t"]["R@1"])
        and table.loc["text→image", "mAP@R %"] == table.loc["text→image", "R@1 %"]
    )
    assert not any(c.startswith("95") for c in retrieval_table(evaluate_retrieval(*noisy(), bootstrap=0)))


# bad input


def damaged(tensor, row, value):
    tensor = tensor.clone()
    tensor[row, 3] = value
    return tensor


IMAGES, TEXTS, OWNERS = noisy()


@pytest.mark.parametrize(
    "args, text",
    [
        ((damaged(IMAGES, 7, math.nan), TEXTS, OWNERS), "image_embeddings: row 7 holds NaN"),
        ((IMAGES, damaged(TEXTS, 170, math.inf), OWNERS), "text_embeddings: row 170 holds NaN or infinity"),
        ((IMAGES[:, :8], TEXTS, OWNERS), "same model"),
        ((IMAGES, TEXTS, OWNERS[:-1]), "each of the 180 rows"),
        ((IMAGES, TEXTS[:-1], OWNERS), "each of the 179 rows"),
        ((IMAGES, TEXTS, OWNERS.float()), "whole number"),
        ((IMAGES[:-1], TEXTS, OWNERS), "caption 173 belongs to image row 29"),
        ((IMAGES, TEXTS, OWNERS - 1), "caption 0 belongs to image row -1"),
        ((IMAGES, TEXTS, OWNERS.clamp(max=28)), "image row 29 has no caption"),
        ((IMAGES[0], TEXTS, OWNERS), r"shape \(16,\)"),
        ((IMAGES[:0], TEXTS, OWNERS), r"shape \(0, 16\)"),
        ((IMAGES, TEXTS, OWNERS, (1, 0)), "at least 1"),
        ((IMAGES, TEXTS, OWNERS, (1.5,)), "at least 1"),
    ],
)
def test_evaluation_refuses(args, text):
    with pytest.raises(LabError, match=text):
        evaluate_retrieval(*args)


@pytest.mark.parametrize(
    "args, text",
    [
        ((TEXTS, IMAGES, 31), "k of at most 30"),
        ((TEXTS, IMAGES, 0), "at least 1"),
        ((TEXTS[0], IMAGES, 5), r"x\[None\]"),
        ((TEXTS[:, :8], IMAGES, 5), "same model"),
        ((damaged(TEXTS, 0, math.nan), IMAGES, 5), "query_embeddings: row 0"),
    ],
)
def test_search_refuses(args, text):
    with pytest.raises(LabError, match=text):
        top_k(*args)


def test_ranks_refuse_a_question_without_an_answer():
    with pytest.raises(LabError, match="query 1 .label 99. has no right answer"):
        ranks(IMAGES[:2], IMAGES, [0, 99], range(30))
