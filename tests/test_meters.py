"""Every meter on a case whose answer is known."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import finished
from torch import nn
from torch.testing import assert_close

from clip475.core.config import LabConfig
from clip475.core.devices import seed_everything
from clip475.core.files import error_message
from clip475.models.freezing import snapshot
from clip475.models.joint import _weight_decay_groups, build_model
from clip475.models.policies import POLICIES, apply_policy
from clip475.models.tables import component_table
from clip475.training import meters
from clip475.training.meters import (
    _embedding_drift,
    _gradient_norms,
    _largest_batch,
    _linear_cka,
    _median_seconds,
    _resting_bytes,
    _similarity_drift,
    _step_parts,
    _tensor_bytes,
    _weight_drift,
    activation_bytes,
    peak_bytes,
)

TINY = LabConfig.from_preset("tiny", image_size=32)
ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    seed_everything(0)
    return build_model(TINY)


@pytest.fixture(scope="module")
def specified():
    with torch.device("meta"):
        return build_model(LabConfig.from_preset("coco"), pretrained=False)


# ---- bytes ----


def test_storages_count_once():
    x = torch.zeros(10, 10)
    assert _tensor_bytes([x]) == _tensor_bytes([x, x.T, x[3:], x.view(100), x.detach()]) == 400
    assert _tensor_bytes([x, x.clone(), torch.zeros(3, dtype=torch.int64)]) == 824 and _tensor_bytes([]) == 0
    assert (
        _tensor_bytes([torch.empty(7, 5, device="meta"), torch.empty(2, dtype=torch.bfloat16, device="meta")])
        == 144
    )


@pytest.mark.parametrize("policy", ["spec", "head-only", "all"])
def test_the_resting_bytes_are_those_of_the_table(model, policy):
    apply_policy(model, policy)
    optimizer = torch.optim.AdamW(_weight_decay_groups(model, 0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    found = _resting_bytes(model, optimizer)
    expected = component_table(model).iloc[:-1].select_dtypes("number").sum()  # with the logit scale
    assert all(found[name] == expected[name] for name in ("weights", "buffers", "gradients", "optimizer"))
    model.zero_grad()
    assert _resting_bytes(model) == found | {"gradients": 0, "optimizer": 0}


def test_known_activations():
    x = torch.randn(8, 100, requires_grad=True)
    assert activation_bytes(lambda: x.exp()) == 3200  # its output
    assert activation_bytes(lambda: x + x) == 0
    assert activation_bytes(lambda: x * x) == 3200  # one storage, saved twice
    layer = nn.Linear(100, 5)
    assert (
        activation_bytes(lambda: layer(x), layer) == 3200
        and activation_bytes(lambda: layer(x)) == 3200 + 2000
    )
    with torch.no_grad():
        assert activation_bytes(lambda: layer(x).exp(), layer) == 0


def test_the_backward_pass_still_runs_after_a_look():
    layer, x = nn.Linear(4, 1), torch.ones(2, 4)
    box = []
    activation_bytes(lambda: box.append(layer(x).sum()), layer)
    box[0].backward()
    assert_close(layer.weight.grad, torch.full((1, 4), 2.0))


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in ("locked-image", "none")])
def test_meta_weighs_the_image_tower_as_real_tensors_do(model, policy):
    with torch.device("meta"):
        meta_model = build_model(TINY, pretrained=False)

    def weigh(model, batch, device):
        pixels = torch.zeros(batch, 3, 32, 32, device=device)
        return activation_bytes(lambda: model.encode_image(pixels), model)

    found = []
    for each, device in ((model, "cpu"), (meta_model, "meta")):
        apply_policy(each.train(), policy)
        found.append([weigh(each, batch, device) for batch in (2, 4, 6)])
    small, middle, large = found[0]
    assert found[0] == found[1]
    assert large - middle == middle - small > 0  # a line: BatchNorm keeps its statistics too


def test_activations_of_the_specification(specified):
    def each(policy):
        apply_policy(specified.train(), policy)
        return (
            activation_bytes(
                lambda: specified(
                    torch.empty(2, 3, 224, 224, device="meta"),
                    torch.empty(2, 77, dtype=torch.long, device="meta"),
                ),
                specified,
            )
            / 2
        )

    assert (
        each("norms-only") > 0.9 * each("spec") > 5 * each("last-n")
        and each("none") == 0 < each("head-only") < 1e5
    )
    apply_policy(specified, "spec")


# ---- the peak ----

PEAK = """
import torch
from clip475.core.devices import _keep_freed_memory
from clip475.training.meters import peak_bytes
torch.set_num_threads(1)
{before}
def one(): torch.ones(50_000_000)
def two_in_turn(): one(); one()
def two_at_once(): a = torch.ones(50_000_000); b = torch.ones(50_000_000)
one()
print(*(round(peak_bytes(f)/1e6) for f in (one, two_in_turn, two_at_once, lambda: None)))
"""


@pytest.mark.parametrize("before", ["", "_keep_freed_memory()"])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is sampled")
def test_the_peak_of_a_process(before):
    out = finished([sys.executable, "-c", PEAK.format(before=before)], cwd=ROOT).stdout.split()
    one, turn, both, nothing = map(int, out)
    assert 190 < one < 230 and 390 < both < 440 and nothing < 10
    assert 190 < turn < (440 if before else 230)  # a heap of free pieces may hold neither of the two


SAMPLED = """
import torch
from clip475.training import meters
meters._forget_peak = lambda: False
kept = []
print(meters.peak_bytes(lambda: kept.append(torch.ones(50_000_000))) / 1e6)
"""


def test_a_peak_that_nobody_keeps_is_sampled():
    assert 190 < float(finished([sys.executable, "-c", SAMPLED], cwd=ROOT).stdout) < 260


@pytest.mark.parametrize("kept", [True, False])
def test_an_error_inside_is_passed_on_and_the_watch_stops(monkeypatch, kept):
    import threading

    if not kept:
        monkeypatch.setattr(meters, "_forget_peak", lambda: False)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    assert threading.active_count() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_is_exact():
    def two_at_once():
        return [torch.ones(50_000_000, device="cuda") for _ in range(2)]

    assert 400e6 <= peak_bytes(two_at_once, "cuda") < 401e6


# ---- the largest batch ----


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 10**6), st.integers(2, 5000))
def test_a_straight_line_gives_the_largest_batch(base, each, batch):
    found = _largest_batch(lambda b: base + each * b, base + each * batch + each // 2)
    assert (
        found["batch"] == found["predicted"] == batch
        and found["bytes_per_item"] == each
        and found["fixed"] == base
    )


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10**4), st.floats(1, 1.3), st.integers(10**6, 10**8))
def test_what_comes_out_always_fits(base, each, power, memory):
    measured = []

    def measure(b):
        measured.append((b, base + int(each * b**power)))
        return measured[-1][1]

    try:
        found = _largest_batch(measure, memory)
    except ValueError:
        assert base + each * 2**power > memory * 0.5 or base >= memory * 0.9
        return
    assert (
        found["measured"] <= memory and (found["batch"], found["measured"]) in measured
    )  # checked, not only worked out


def test_batches_that_cannot_be(specified):
    error_message("hold no batch", _largest_batch, lambda b: 2e9 + b, 1e9)
    error_message("does not grow", _largest_batch, lambda b: 5, 1e9)
    assert _largest_batch(lambda b: 10 * b, 1000, fixed=500)["batch"] == 50


# ---- time ----


def test_the_median_of_repeats_without_the_first():
    now, order, steps = [0.0], [], iter([50, 7, 3, 1, 30, 2, 4, 9])

    def forward():
        order.append("f")
        now[0] += next(steps)

    def backward():
        order.append("b")
        now[0] += next(steps)

    found = _median_seconds(
        {"forward": forward, "backward": backward}, repeats=3, warmup=1, clock=lambda: now[0]
    )
    assert order == ["f", "b"] * 4 and found == {"forward": 4, "backward": 2}


def test_the_parts_of_a_step_make_a_step():
    torch.manual_seed(0)
    a, x = nn.Linear(3, 1), torch.randn(5, 3)
    b = nn.Linear(3, 1)
    b.load_state_dict(a.state_dict())
    optimizer = torch.optim.SGD(a.parameters(), lr=0.1)
    seconds = _median_seconds(_step_parts(lambda: a(x).square().mean(), optimizer), repeats=2, warmup=1)
    assert list(seconds) == ["forward", "backward", "step"] and all(s > 0 for s in seconds.values())
    other = torch.optim.SGD(b.parameters(), lr=0.1)
    for _ in range(3):
        other.zero_grad()
        b(x).square().mean().backward()
        other.step()
    assert_close(a.weight, b.weight)


# ---- gradients ----


def test_gradient_norms_make_the_whole(model):
    apply_policy(model.train(), "all")
    model.zero_grad()
    ids = torch.tensor([[49406, 320, 736, 49407]] * 4)
    (
        model.encode_image(torch.randn(4, 3, 32, 32)).sum()
        + model.encode_text(ids)[:, 0].sum()
        + model.logit_scale * 3
    ).backward()
    whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    for by in ("component", "layer"):
        assert_close(math.hypot(*_gradient_norms(model, by).values()), whole, rtol=1e-4, atol=0.0)
    assert (
        list(_gradient_norms(model)) == ["backbone", "projection head", "text encoder", "logit scale"]
        and _gradient_norms(model)["logit scale"] == 3
    )
    layers = _gradient_norms(model, "layer")
    assert_close(
        layers["image_encoder.head.2"],
        math.hypot(*(p.grad.double().norm().item() for p in model.image_encoder.head[2].parameters())),
    )
    error_message("component, layer", _gradient_norms, model, "block")
    apply_policy(model, "spec")
    assert _gradient_norms(model)["text encoder"] == 0 and not any(
        n.startswith("text_encoder") for n in _gradient_norms(model, "layer")
    )
    model.zero_grad()


# ---- drift ----


def test_weight_drift_is_a_relative_distance(model):
    apply_policy(model, "spec")
    before = snapshot(model)
    assert set(_weight_drift(before, model).values()) == {0.0}
    with torch.no_grad():
        for p in model.image_encoder.head.parameters():
            p.mul_(-1)
        model.logit_scale.mul_(1.25)
    found = _weight_drift(before, model)
    with torch.no_grad():
        for p in model.image_encoder.head.parameters():
            p.mul_(-1)
        model.logit_scale.div_(1.25)
    assert_close(
        found,
        {"backbone": 0.0, "projection head": 2.0, "text encoder": 0.0, "logit scale": 0.25},
        atol=1e-6,
        rtol=1e-6,
    )


def test_embedding_drift_is_a_mean_cosine():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    assert _embedding_drift(a, a) == 1 and _embedding_drift(a, b) == 0.5 and _embedding_drift(a, -a) == -1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_cka_sees_neither_rotation_nor_scale(seed, scale):
    g = torch.Generator().manual_seed(seed)
    x, shift = (
        torch.randn(30, 8, generator=g, dtype=torch.float64),
        torch.randn(8, generator=g, dtype=torch.float64),
    )
    turn = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))[0]
    y = torch.randn(30, 5, generator=g, dtype=torch.float64)
    assert_close(_linear_cka(x, scale * x @ turn + shift), 1.0)
    assert_close(_linear_cka(x, y), _linear_cka(y, x))
    assert_close(_linear_cka(x @ turn, y), _linear_cka(x, y))
    assert 0 <= _linear_cka(x, y) < 1


def test_cka_by_the_definition():
    "HSIC of the centred Gram matrices (Kornblith et al. 2019, equations 2 and 3), written out."
    torch.manual_seed(0)
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20

    def hsic(a, b):
        return (a @ centre @ b @ centre).trace()

    k, m = x @ x.T, y @ y.T
    assert_close(_linear_cka(x, y), (hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()).item())


def test_similarity_drift_known_by_hand():
    one, two = (
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    )
    # cosines of the pairs (01, 02, 12): 0, 1, 0 before; 1, 0, 0 after: each of two pairs moved by 1
    assert_close(_similarity_drift(one, two)["mean_change"], 2 / 3)
    turned = one @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert_close(_similarity_drift(one, turned), {"cka": 1.0, "mean_change": 0.0})
    assert _embedding_drift(one, turned) == 0  # every embedding moved by a right angle, and no similarity did
