"Maps and measures of the shared space, against cases whose answer is known, and fed with nonsense."

import importlib.util
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip475.core.config import LabConfig
from clip475.core.figures import plot_gallery
from clip475.core.files import error_message
from clip475.evaluation.space import (
    _cluster_order,
    _gap_vector,
    _hubness,
    _keep_embeddings,
    _nearest_others,
    _neighbour_overlap,
    _neighbour_rows,
    _plot_ordered,
    _plot_strip,
    _project_stages,
    _spread_out,
    _uniform_value,
    alignment,
    modality_gap,
    plot_map,
    project,
    separability,
    shift_gap,
    space_measures,
    uniformity,
)
from clip475.training.batches import prepare_data
from clip475.training.runs import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed).double(), dim=-1)


# maps
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_is_the_same_each_time_and_of_both_sets(method):
    images, texts = random_unit(20, 16), random_unit(35, 16, seed=1)
    a, b = project(images, texts, method), project(images.float().double(), texts, method)
    assert a[0].shape == (20, 2) and a[1].shape == (35, 2) and a[0].dtype == np.float64
    assert all(np.isfinite(x).all() for x in a)
    np.testing.assert_array_equal(a[0], project(images, texts, method)[0])
    np.testing.assert_allclose(
        a[0], b[0], atol=1e-3 if method == "pca" else 100
    )  # t-SNE may not forgive a rounding


def test_pca_is_a_shadow_of_the_centred_unit_vectors():
    images, texts = random_unit(12, 7), random_unit(9, 7, seed=1)
    cloud = torch.cat([images, texts])
    u, s, _ = torch.linalg.svd(cloud - cloud.mean(0), full_matrices=False)
    found = np.concatenate(project(3 * images, texts))  # lengths do not count
    np.testing.assert_allclose(np.abs(found), (u * s)[:, :2].abs().numpy(), atol=1e-9)


def test_tsne_keeps_two_clusters_apart():
    centres = torch.eye(8, dtype=torch.float64)[:2]
    images, texts = (
        F.normalize(centres.repeat_interleave(20, 0) + 0.05 * normal(40, 8, seed=s).double(), dim=1)
        for s in (0, 1)
    )
    a, b = project(images, texts, "tsne", perplexity=8)
    first, second = np.concatenate([a[:20], b[:20]]), np.concatenate([a[20:], b[20:]])
    assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * max(first.std(), second.std())


@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="umap-learn is not installed")
@pytest.mark.filterwarnings("ignore")
def test_umap_where_it_is_installed():
    images, texts = random_unit(15, 8), random_unit(15, 8, seed=1)
    a, b = project(images, texts, "umap"), project(images, texts, "umap")
    assert a[0].shape == a[1].shape == (15, 2) and np.array_equal(a[0], b[0])


def test_without_umap_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "tsne" in error_message(
        "umap-learn, which is not installed", project, random_unit(9, 4), random_unit(9, 4), "umap"
    )


@pytest.mark.parametrize(
    "images, texts, kwargs, said",
    [
        (torch.full((9, 4), torch.nan), random_unit(9, 4), {}, "image_embeddings: row 0 holds NaN"),
        (random_unit(9, 4), torch.full((9, 4), torch.inf), {}, "text_embeddings: row 0"),
        (random_unit(9, 4), random_unit(9, 5), {}, "4 wide and text_embeddings 5"),
        (random_unit(1, 4), random_unit(1, 4), {}, "at least 3"),
        (random_unit(9), random_unit(9, 4), {}, "(N, D)"),
        (random_unit(1, 4).expand(5, -1), random_unit(1, 4), {}, "collapsed"),
        (random_unit(9, 4), random_unit(9, 4), {"method": "lda"}, "pca, tsne, umap"),
        (random_unit(9, 4), random_unit(9, 4), {"method": "tsne", "perplexity": 6}, "allow 1 to 6"),
        (random_unit(9, 4), random_unit(9, 4), {"method": "tsne", "perplexity": 0}, "perplexity is 0"),
        (
            random_unit(9, 4),
            random_unit(9, 4),
            {"method": "tsne", "perplexity": math.nan},
            "perplexity is nan",
        ),
    ],
)
def test_what_cannot_be_mapped(images, texts, kwargs, said):
    error_message(said, project, images, texts, **kwargs)


def test_three_points_are_enough():
    for method in ("pca", "tsne"):
        assert np.isfinite(np.concatenate(project(random_unit(2, 4), random_unit(1, 4), method))).all()


def test_spread_out_rows_cover():
    points = random_unit(200, 2).numpy()
    rows = _spread_out(points, 12)
    assert len(set(rows)) == 12
    reach = max(np.linalg.norm(points - p, axis=1).max() for p in points)
    assert max(min(np.linalg.norm(p - points[r]) for r in rows) for p in points) < reach / 4
    assert _spread_out(points[:1], 5) == [0]


def test_stages_share_the_axes_of_the_reference():
    texts = random_unit(10, 8)
    stages = [(random_unit(6, 8, seed=s), texts) for s in (1, 2, 3)]
    maps = _project_stages(stages)
    for _, t in maps:
        np.testing.assert_allclose(t, maps[0][1])  # what does not move in space does not move on paper
    np.testing.assert_allclose(maps[-1][0], project(*stages[-1])[0], atol=1e-9)
    by_groups = _project_stages(stages, groups=["a", "a", "b", "b", "c", "c"])
    assert by_groups[0][0].shape == (6, 2)
    error_message("2 groups", _project_stages, stages, groups=["a", "b"] * 3)
    error_message("6 images and 5 groups", _project_stages, stages, groups=["a"] * 5)


def test_figures_are_drawn_and_checked():
    images, texts = random_unit(12, 6), random_unit(20, 6, seed=1)
    groups, pictures = ["a", "b", "c"] * 4, np.zeros((12, 8, 8, 3), np.uint8)
    points = project(images, texts)
    fig = plot_map(*points, groups, ["a", "d"] * 10, pictures, shown=5)
    assert {t.get_text() for t in fig.legends[0].texts} == {"a", "b", "c", "d"}
    assert len([a for a in fig.axes[0].artists]) == 5
    plot_map(points[0])
    assert len(_plot_strip([points] * 3, groups, ["a"] * 20, "xyz").axes) == 3
    _plot_ordered(images @ images.T, _cluster_order(images), groups)  # no run of three: no names, no error
    _plot_ordered(images @ images.T, range(12), sorted(groups))
    error_message("20 texts on the map and 19 groups", plot_map, *points, groups, ["a"] * 19)
    error_message("12 images on the map and 2 groups", plot_map, *points, ["a", "b"])


# measures
def test_the_gap_of_known_clouds():
    cloud = random_unit(50, 8)
    move = normal(8, seed=3).double()
    assert modality_gap(cloud, cloud) == 0
    assert modality_gap(cloud + move, cloud) == pytest.approx(move.norm().item())
    torch.testing.assert_close(_gap_vector(cloud + move, cloud.flip(0)), move)
    assert modality_gap(torch.eye(3)[:1], -torch.eye(3)[:1]) == pytest.approx(2)
    assert modality_gap(random_unit(9, 3).numpy(), random_unit(9, 3).numpy()) == 0
    error_message("wide", modality_gap, cloud, cloud[:, :3])
    error_message("NaN", modality_gap, cloud * torch.nan, cloud)


def test_half_the_vector_closes_the_gap_and_none_leaves_all_as_it_is():
    images, texts = (F.normalize(random_unit(300, 32, seed=s) + torch.eye(32)[s], dim=1) for s in (0, 1))
    same = shift_gap(images, texts, 0)
    torch.testing.assert_close(same[0], images)
    assert modality_gap(*shift_gap(images, texts, 0.5)) < 0.1 * modality_gap(images, texts)
    torch.testing.assert_close(shift_gap(images, texts, 0.3)[1].norm(dim=1), torch.ones(300).double())


def test_a_cut_tells_apart_what_is_apart_and_nothing_else():
    same = random_unit(200, 8)
    assert 0.35 < separability(same[:100], same[100:]) < 0.65
    assert separability(same[:60] + 2 * torch.eye(8)[0], same[60:] - 2 * torch.eye(8)[0]) > 0.98
    error_message("at least 5", separability, same[:4], same)


def test_alignment_of_known_pairs():
    images = random_unit(6, 9)
    assert alignment(images, images) == 0
    assert alignment(images, -images) == pytest.approx(4) and alignment(
        images, -images, alpha=1
    ) == pytest.approx(2)
    owner = torch.tensor([0, 0, 5, 2, 2])
    assert alignment(images, images[owner], owner) == pytest.approx(0)
    assert alignment(images, images[owner].flip(0), owner.flip(0)) == pytest.approx(0)
    texts = random_unit(5, 9, seed=1)
    assert alignment(images, texts, owner) == pytest.approx(
        np.mean([((images[o] - t) ** 2).sum() for o, t in zip(owner, texts)])
    )
    error_message("row 6", alignment, images, random_unit(7, 9))
    error_message("row 0 has length 3", alignment, 3 * images, images)


@pytest.mark.parametrize("dim", [2, 3, 10, 512])
def test_uniformity_of_an_even_sphere(dim):
    assert uniformity(random_unit(3000, dim)) == pytest.approx(_uniform_value(dim), abs=0.02)


def test_uniformity_is_the_mean_over_pairs():
    rows = random_unit(40, 5)
    for t in (0.5, 2, 7):
        expected = torch.pdist(rows).pow(2).mul(-t).exp().mean().log().item()
        assert uniformity(rows, t) == pytest.approx(expected) and uniformity(
            rows, t, block=7
        ) == pytest.approx(expected)
    assert uniformity(rows[:1].expand(9, -1)) == pytest.approx(0)
    assert uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    assert _uniform_value(2) == pytest.approx(
        math.log(np.mean(np.exp(-2 * (2 - 2 * np.cos(np.linspace(0, 2 * np.pi, 10000, endpoint=False))))))
    )
    error_message("at least 2", uniformity, rows[:1])
    error_message("normalise", uniformity, 2 * rows)
    error_message("NaN", uniformity, rows * torch.nan)


def test_a_planted_hub_is_found():
    queries = random_unit(100, 64)
    hub = F.normalize(queries.mean(0, keepdim=True), dim=1)
    gallery = torch.cat([random_unit(60, 64, seed=5), hub])
    counts, skew = _hubness(queries, gallery, 5)
    assert counts.sum() == 500 and counts.argmax() == 60
    assert skew > _hubness(queries, gallery[:60], 5)[1] + 1
    error_message("gallery", _hubness, queries, gallery, 62)


# neighbours
def test_nearest_others_by_brute_force_with_twins():
    rows = torch.cat(
        [random_unit(20, 4)] * 2 + [random_unit(5, 4, seed=1)]
    )  # every one of the first 40 has a twin
    found = _nearest_others(rows, 6)
    assert not (found == torch.arange(45)[:, None]).any()
    assert [found[i, 0].item() for i in range(40)] == [(i + 20) % 40 for i in range(40)]
    scores = (rows @ rows.T).fill_diagonal_(-9)
    torch.testing.assert_close(scores.gather(1, found), scores.topk(6).values)


def test_many_twins_leave_out_the_row_itself():
    rows = torch.ones(9, 3)
    found = _nearest_others(rows, 3)
    assert found.shape == (9, 3) and not (found == torch.arange(9)[:, None]).any()


def test_overlap_of_known_spaces():
    rows = random_unit(60, 16)
    turn = torch.linalg.qr(normal(16, 16).double())[0]
    assert _neighbour_overlap(rows, rows @ turn, 7).eq(1).all()
    shuffled = _neighbour_overlap(rows, random_unit(60, 16, seed=9), 7).mean()
    assert shuffled.item() == pytest.approx(7 / 59, abs=0.06)
    assert _neighbour_overlap(rows, random_unit(60, 16, seed=9), 59).eq(1).all()  # all others are neighbours
    for k in (0, 60, True, 2.0):
        error_message("59 others", _nearest_others, rows, k)
    error_message("one text row per image", _neighbour_overlap, rows, rows[:9])


def test_neighbour_rows_mark_what_both_lists_hold():
    images, texts = random_unit(30, 8), random_unit(30, 8, seed=1)
    pictures = np.arange(30)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3).astype(np.uint8)
    rows = _neighbour_rows(4, images, texts, pictures, "a caption", k=6, shown=6)
    by_picture, by_words = ({int(p[0, 0, 0]) for p in r.results} for r in rows)
    for r in rows:
        assert [h for h in r.hits] == [int(p[0, 0, 0]) in by_picture & by_words for p in r.results]
    assert sum(rows[0].hits) == sum(rows[1].hits) and "a caption" in rows[1].query
    plot_gallery(rows)


def test_cluster_order_joins_what_belongs_together():
    kinds = torch.arange(5).repeat(8)
    rows = F.normalize(torch.eye(5, 16)[kinds] + 0.05 * normal(40, 16), dim=1)
    order = _cluster_order(rows)
    assert kinds[order].diff().ne(0).sum() == 4 and order.sort().values.equal(torch.arange(40))
    error_message("2 rows", _cluster_order, rows[:2])
    error_message("zeros", _cluster_order, torch.cat([rows, torch.zeros(1, 16)]))


# a run
def test_kept_epochs_begin_with_the_model_that_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    config = LabConfig.from_preset(
        "tiny", train_images=64, val_images=16, image_size=32, epochs=2, batch_size=32
    )
    train, val = prepare_data(config, progress=False)
    kept, watch = _keep_embeddings(val, config)
    fit(config, train, val, tmp_path / "run", progress=False, watch=watch)
    assert [epoch for epoch, _ in kept] == [0, 1, 2] and all(i.shape == (16, 512) for _, i in kept)
    again, _ = _keep_embeddings(val, config)
    assert again[0][1].equal(kept[0][1]) and not kept[0][1].equal(kept[1][1])
    numbers = space_measures(kept[-1][1], val.text_embeddings, val.split.caption_image, k=3)
    assert len(numbers) == 8 and all(math.isfinite(v) for v in numbers.values())
