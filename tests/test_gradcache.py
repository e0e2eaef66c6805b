"Gradient caching against one graph over the whole batch."

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as module_hooks

from clip475.core.files import LabError
from clip475.training.large_batches import _peak_saved_bytes, cached_backward
from clip475.training.loss import info_nce

pytestmark = pytest.mark.usefixtures("one_thread")


class Tower(nn.Module):
    """A small convolutional image tower, with everything that may go wrong: BatchNorm, dropout, a
    normalised output."""

    def __init__(self, dropout=0.0, width=8, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(3, width, 3, stride=2),
                nn.BatchNorm2d(width),
                nn.GELU(),
                nn.Conv2d(width, 2 * width, 3, stride=2),
                nn.BatchNorm2d(2 * width),
                nn.GELU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Dropout(dropout),
                nn.Linear(2 * width, 6),
            )

    def forward(self, x):
        return F.normalize(self.layers(x).to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def without_statistics(self):
        "In training mode, but for BatchNorm."
        for m in self.train().modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        return self


def batch(B, dtype=torch.float32, seed=1, size=12):
    generator = torch.Generator().manual_seed(seed)
    texts = F.normalize(torch.randn(B, 6, generator=generator, dtype=dtype), dim=-1)
    return torch.randn(B, 3, size, size, generator=generator, dtype=dtype), texts


def run(step, *modules, seed=7):
    "The value of `step(scale)` and all gradients, from the same seed."
    dtype = next(modules[0].parameters()).dtype
    scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
    params = [scale, *(p for m in modules for p in m.parameters())]
    for p in params:
        p.grad = None
    torch.manual_seed(seed)
    loss = step(scale)
    return loss.detach(), [p.grad for p in params]


def as_one_graph(tower, chunks, texts, backward=torch.Tensor.backward):
    def step(scale):
        loss = info_nce(torch.cat([tower(x) for x in chunks]), texts, scale)
        backward(loss)
        return loss

    return step


def as_cached(tower, chunks, texts, backward=torch.Tensor.backward):
    return lambda scale: cached_backward(tower, chunks, lambda e: info_nce(e, texts, scale), backward)


def close(a, b, dtype=torch.float32):
    tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(a, b, **tolerance)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda s: sum(s) > 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_split_gives_the_gradient_of_the_plain_batch(sizes, dtype, seed):
    tower, (x, texts) = Tower(seed=seed).to(dtype).eval(), batch(sum(sizes), dtype, seed)
    close(
        run(as_cached(tower, x.split(sizes), texts), tower),
        run(as_one_graph(tower, [x], texts), tower),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_draws_the_same_masks_in_both_passes(dtype):
    tower, (x, texts) = Tower(dropout=0.5).to(dtype).without_statistics(), batch(24, dtype)
    chunks = x.split([5, 8, 8, 3])
    close(run(as_cached(tower, chunks, texts), tower), run(as_one_graph(tower, chunks, texts), tower), dtype)


def test_random_numbers_go_on_where_the_plain_step_would_leave_them():
    tower, (x, texts) = Tower(dropout=0.5).without_statistics(), batch(12)

    def noisy(loss):
        return loss * torch.rand(())  # a loss that draws, too

    def plain(scale):
        return noisy(info_nce(torch.cat([tower(c) for c in x.split(4)]), texts, scale))

    run(plain, tower)
    after = torch.rand(3)
    run(lambda scale: cached_backward(tower, x.split(4), lambda e: noisy(info_nce(e, texts, scale))), tower)
    assert torch.equal(torch.rand(3), after)


def test_batchnorm_in_training_mode_normalises_each_chunk_by_itself():
    start, (x, texts) = Tower().double().train(), batch(24, torch.float64)
    towers = [copy.deepcopy(start) for _ in range(3)]
    cached, chunked = (
        run(as_cached(towers[0], x.split(8), texts), towers[0]),
        run(as_one_graph(towers[1], x.split(8), texts), towers[1]),
    )
    close(cached, chunked, torch.float64)
    whole = run(as_one_graph(towers[2], [x], texts), towers[2])
    assert (cached[1][1] - whole[1][1]).norm() > 0.01 * whole[1][1].norm()  # and that is not the whole batch


def test_running_statistics_are_updated_exactly_once():
    cached, plain, (x, texts) = Tower().train(), Tower().train(), batch(24)
    run(as_cached(cached, x.split(8), texts), cached)
    with torch.no_grad():
        [plain(c) for c in x.split(8)]
    for (name, a), b in zip(cached.named_buffers(), plain.buffers()):
        assert torch.equal(a, b), name
    assert cached.layers[1].num_batches_tracked == 3


def test_any_buffer_is_put_back_even_one_that_is_replaced():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1  # a new tensor, not a change in place
            return x * self.weight * self.calls

    tower, x = Counting(), torch.randn(9, 6)
    cached_backward(tower, x.split(3), lambda e: e.sum())
    assert tower.calls == 3 and "calls" in dict(tower.named_buffers())
    torch.testing.assert_close(tower.weight.grad, sum(i * c.sum(0) for i, c in enumerate(x.split(3), 1)))


def test_spectral_norm_repeats_itself():
    from torch.nn.utils.parametrizations import spectral_norm

    make = lambda: spectral_norm(nn.Linear(6, 6))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        a = make().train()
        torch.manual_seed(0)
        b = make().train()
    x, texts = torch.randn(12, 6), batch(12)[1]
    close(run(as_cached(a, x.split(4), texts), a), run(as_one_graph(b, x.split(4), texts), b))


@pytest.mark.parametrize("outside", [False, True])
def test_under_autocast(outside):
    """Also where the whole step lies in one autocast block, whose cache would hand graph-less weights to
    the second pass."""
    tower, (x, texts) = Tower().eval(), batch(24)
    half = torch.autocast("cpu", dtype=torch.bfloat16)

    def encode(c):
        with nullcontext() if outside else half:
            return tower(c)

    with half if outside else nullcontext():
        cached = run(as_cached(encode, x.split(8), texts), tower)
        plain = run(as_one_graph(encode, x.split(8), texts), tower)
    assert all(g is not None and g.abs().sum() > 0 for g in cached[1])
    for a, b in zip(cached[1], plain[1]):
        assert (a - b).norm() <= 0.02 * b.norm() + 1e-6


def test_with_a_scaled_backward():
    tower, (x, texts), scaler = Tower().eval(), batch(24), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = run(as_cached(tower, x.split(8), texts, lambda loss: scaler.scale(loss).backward()), tower)
    plain = run(as_cached(tower, x.split(8), texts), tower)
    torch.testing.assert_close(scaled[0], plain[0])  # the loss itself is not scaled
    close([g / 1024 for g in scaled[1]], plain[1])


def test_gradients_add_to_those_that_are_there():
    tower, (x, texts) = Tower().eval(), batch(12)
    cached_backward(tower, x.split(4), lambda e: info_nce(e, texts, 2.0))
    once = [p.grad.clone() for p in tower.parameters()]
    cached_backward(tower, x.split(4), lambda e: info_nce(e, texts, 2.0))
    close([p.grad for p in tower.parameters()], [2 * g for g in once])


def test_chunks_may_be_anything_that_encode_takes():
    tower, (x, texts) = Tower().eval(), batch(12)

    def step(scale):
        return cached_backward(
            lambda i: tower(x[4 * i : 4 * i + 4]), iter(range(3)), lambda e: info_nce(e, texts, scale)
        )

    close(run(step, tower), run(as_one_graph(tower, [x], texts), tower))


def test_a_compiled_tower_keeps_its_statistics_too():
    cached, plain, (x, texts) = Tower().train(), Tower().train(), batch(24)
    torch._dynamo.reset()
    graphs, compiled = (
        [],
        torch.compile(cached, backend=lambda graph, inputs: graphs.append(graph) or graph.forward),
    )

    def step(scale):
        return cached_backward(compiled, x.split(8), lambda e: info_nce(e, texts, scale), module=cached)

    a, b = run(step, cached), run(as_one_graph(plain, x.split(8), texts), plain)
    close(a, b)
    for (name, u), v in zip(cached.named_buffers(), plain.buffers()):
        torch.testing.assert_close(u, v, msg=name)
    assert len(graphs) == 2  # one without and one with a graph of gradients


def test_memory_of_4096_is_that_of_64():
    tower, (x, texts) = Tower(width=4).train(), batch(4096, size=8)
    there = [x, texts, *tower.parameters()]

    def small():
        as_one_graph(tower, [x[:64]], texts[:64])(2.0)

    def cached():
        as_cached(tower, x.split(64), texts)(2.0)

    encode_only = _peak_saved_bytes(lambda: tower(x[:64]).sum().backward(), there)
    losses = _peak_saved_bytes(lambda: info_nce(texts.clone().requires_grad_(), texts, 2.0).backward(), there)
    most = _peak_saved_bytes(cached, there)
    assert _peak_saved_bytes(small, there) >= encode_only
    assert most <= max(
        1.1 * encode_only, 1.01 * losses + 2**20
    )  # the B × B matrices of the loss, and nothing of the tower
    second_pass = _peak_saved_bytes(
        lambda: cached_backward(tower, x.split(64), lambda e: e.square().sum()), there
    )
    assert second_pass <= max(
        1.1 * encode_only, 1.1 * 4096 * 6 * 4
    )  # a loss that keeps nothing large: 64 pictures' worth
    assert _peak_saved_bytes(lambda: tower(x).sum().backward(), there) > 50 * encode_only


def test_what_autograd_keeps_is_counted_once_and_let_go():
    x = torch.randn(1000, requires_grad=True)
    assert _peak_saved_bytes(lambda: x.exp().sum().backward()) == 4000
    assert (
        _peak_saved_bytes(lambda: [x.exp().sum().backward() for _ in range(5)]) == 4000
    )  # freed after each backward pass
    assert _peak_saved_bytes(lambda: (x * x).sum().backward()) == 4000  # one storage, saved twice
    assert _peak_saved_bytes(lambda: (x * x).sum().backward(), [x]) == 0


@pytest.mark.parametrize(
    "encode, chunks, loss_of, text",
    [
        (nn.Linear(4, 4), [], torch.sum, "no chunks"),
        (
            nn.Linear(4, 4),
            torch.randn(2, 3, 4),
            lambda e: nn.Parameter(torch.ones(())) * 2,
            "does not depend",
        ),
        (nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 3, 4), torch.sum, "without a graph"),
    ],
)
def test_errors(encode, chunks, loss_of, text):
    with pytest.raises(LabError, match=text):
        cached_backward(encode, chunks, loss_of)


def test_an_encoder_that_changes_its_mind_is_refused():
    lengths = iter([3, 3, 3, 2])
    with pytest.raises(LabError, match="the same each time"):
        cached_backward(
            lambda x: x[: next(lengths)] * nn.Parameter(torch.ones(4)), torch.randn(2, 3, 4), torch.sum
        )


def test_an_error_in_the_first_pass_leaves_no_hook_and_no_trace():
    tower, (x, _) = Tower().train(), batch(8)
    before = copy.deepcopy(tower.state_dict())

    def encode(c):
        if c is last:
            raise RuntimeError("broken picture")
        return tower(c)

    *first, last = x.split(4)
    with pytest.raises(RuntimeError, match="broken picture"):
        cached_backward(encode, [*first, last], torch.sum)
    assert not module_hooks._global_forward_pre_hooks
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name])
