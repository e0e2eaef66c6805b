"bench/mistakes.py: its measures are the library's, and its mistakes do what they are named after."

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clip475.evaluation.retrieval import recall_at_k
from clip475.training.loss import info_nce

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "results" / "mistakes_photos.json"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="bench/ is not here"),
]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_mistakes", ROOT / "bench" / "mistakes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data():
    "Twenty pictures with three captions each, in eight dimensions."
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 8, generator=generator)
    texts = F.normalize(features.repeat_interleave(3, 0) + torch.randn(60, 8, generator=generator), dim=1)
    return {
        "features": features,
        "texts": texts,
        "captions": [[3 * row, 3 * row + 1, 3 * row + 2] for row in range(20)],
        "black": torch.zeros(8),
    }


def test_the_measures_are_the_librarys(bench, data):
    owner = torch.arange(20).repeat_interleave(3)
    scores = F.normalize(data["features"], dim=1) @ data["texts"].T
    for k in (1, 5):
        assert bench.image_to_text(scores, owner, k).mean() == recall_at_k(scores, owner, k)
        hits = bench.text_to_image(scores, owner, k)
        found = (scores.T.topk(k).indices == owner[:, None]).any(1)
        assert hits.sum() == found.sum() and hits.max() <= 3


def test_no_mistake_has_no_damage(bench):
    hits = [torch.rand(50) for _ in range(3)]
    same = bench.compare(hits, hits, torch.ones(50))
    assert same["estimate"] == same["low"] == same["high"] == 0
    worse = bench.compare(hits, [h - 0.5 for h in hits], torch.ones(50))
    assert worse["estimate"] == worse["low"] == worse["high"] == -0.5


def test_the_loss_with_the_mistake_hardly_depends_on_the_embeddings(bench):
    perfect = torch.eye(250)
    scale = torch.tensor(math.log(1 / 0.07))
    assert abs(float(bench.times_tau(perfect, perfect, scale, None)) - math.log(250)) < 0.1
    assert info_nce(perfect, perfect, scale) < 0.01


@pytest.mark.parametrize("name", ["right", "times τ", "own captions as negatives", "black pictures"])
def test_the_same_seed_gives_the_same_run(bench, data, name):
    options = bench.TRAININGS[name] | {"pictures": 5, "longer": 1}
    runs = [bench.train_head(data, 1, 2, **options)[2] for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0]["losses"]) == 8


def test_an_average_without_buffers_keeps_the_first_ones(bench, data):
    head, (weights_alone, with_buffers), _ = bench.train_head(data, 1, 2, pictures=5)
    assert torch.equal(weights_alone.layers[0].running_mean, torch.zeros(8))
    assert not torch.equal(with_buffers.layers[0].running_mean, torch.zeros(8))
    assert torch.equal(weights_alone.layers[-1].weight, with_buffers.layers[-1].weight)


@pytest.mark.skipif(not KEPT.is_file(), reason="the kept results are not here")
def test_every_training_is_in_the_kept_result(bench):
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert set(kept["symptoms"]["losses"]) == set(bench.TRAININGS)
    assert kept["batch"] == bench.BATCH and kept["share of black pictures"] == bench.BLACK
    assert set(bench.TRAININGS) - {"right", "right, all captions"} <= set(kept["mistakes"])
