"InfoNCE against judges that share no code with it: pure Python, finite differences, and CLIP's own formula."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from clip475.core import LabError
from clip475.loss import clamp_logit_scale_, info_nce, similarity_logits


pytestmark = pytest.mark.usefixtures("one_thread")


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def by_hand(images, texts, scale, ids=None):
    "InfoNCE read off its definition, with Python floats and nothing else."
    images, texts, B = images.tolist(), texts.tolist(), len(images)
    cosine = [[math.fsum(a*b for a, b in zip(i, t)) for t in texts] for i in images]
    counts = lambda i, j: i == j or ids is None or ids[i] != ids[j]
    loss = 0
    for i in range(B):
        by_row = math.fsum(math.exp(scale * (cosine[i][j] - cosine[i][i])) for j in range(B) if counts(i, j))
        by_column = math.fsum(math.exp(scale * (cosine[j][i] - cosine[i][i])) for j in range(B) if counts(i, j))
        loss += (math.log(by_row) + math.log(by_column)) / (2*B)
    return loss


@settings(max_examples=60, deadline=None)
@given(B=st.integers(2, 9), D=st.integers(1, 8), scale=st.floats(-3, math.log(100)), seed=st.integers(0, 999), data=st.data())
def test_equals_the_definition(B, D, scale, seed, data):
    images, texts = unit(B, D, seed=seed, dtype=torch.float64), unit(B, D, seed=seed + 1, dtype=torch.float64)
    ids = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=B, max_size=B))
    assert info_nce(images, texts, scale, ids).item() == pytest.approx(by_hand(images, texts, math.exp(scale), ids), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("ids", [None, [0, 0, 1, 2, 1]])
def test_gradients_equal_finite_differences(ids):
    inputs = [unit(5, 6, dtype=torch.float64).requires_grad_(), unit(5, 6, seed=1, dtype=torch.float64).requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda i, t, s: info_nce(i, t, s, ids), inputs)


@pytest.mark.parametrize("scale", [0., 2.6593, math.log(100)])
@pytest.mark.parametrize("B", [2, 3, 64, 1000])
def test_equal_logits_give_ln_b(B, scale):
    same = unit(1, 16).expand(B, 16)
    torch.testing.assert_close(info_nce(same, same, scale), torch.tensor(math.log(B)))


def test_symmetric_and_blind_to_the_order_of_pairs():
    images, texts, order = unit(20, 8), unit(20, 8, seed=1), torch.randperm(20)
    ids = torch.arange(20) // 2
    loss = info_nce(images, texts, 2., ids)
    torch.testing.assert_close(info_nce(texts, images, 2., ids), loss)
    torch.testing.assert_close(info_nce(images[order], texts[order], 2., ids[order]), loss)


def test_scale_is_a_logarithm_and_divides_by_the_temperature():
    images, texts = unit(7, 8), unit(7, 8, seed=1)
    torch.testing.assert_close(similarity_logits(images, texts, math.log(1/.07)), images @ texts.T / .07)
    for scale in (torch.tensor(2.), torch.nn.Parameter(torch.tensor(2.)), torch.nn.Parameter(torch.tensor([2.])), 2):
        torch.testing.assert_close(similarity_logits(images, texts, scale), math.exp(2) * images @ texts.T)


def test_scale_gets_its_gradient():
    scale = torch.nn.Parameter(torch.tensor(2.))
    info_nce(unit(7, 8), unit(7, 8), scale).backward()
    assert scale.grad < 0  # matching pairs ask for more scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_for_half_precision_and_under_autocast(dtype):
    images, texts = unit(16, 32).to(dtype), unit(16, 32, seed=1).to(dtype)
    expected = info_nce(images.float(), texts.float(), math.log(100))
    with torch.autocast("cpu", dtype=torch.bfloat16): loss = info_nce(images, texts, math.log(100))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_ids_leave_no_push_between_captions_of_one_image():
    images, texts = unit(6, 8).requires_grad_(), unit(6, 8, seed=1)
    info_nce(images, texts, 2., [3, 3, 3, 3, 3, 3]).backward()  # one image throughout: nothing left to tell apart
    assert images.grad.abs().max() == 0
    loss = info_nce(unit(6, 8), texts, 2., torch.tensor([3, 1, 2, 4, 5, 6]))
    torch.testing.assert_close(loss, info_nce(unit(6, 8), texts, 2.))


def test_pairs_overfit_to_zero_loss():
    texts, images = unit(32, 16), torch.randn(32, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    scale = torch.nn.Parameter(torch.tensor(math.log(1/.07)))
    optimizer = torch.optim.Adam([images, scale], lr=.05)
    for _ in range(300):
        loss = info_nce(F.normalize(images, dim=-1), texts, scale)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); clamp_logit_scale_(scale)
    assert loss < 1e-3 and scale.exp() <= 100.001


def test_clamp_is_in_place_and_one_sided():
    scale = torch.nn.Parameter(torch.tensor(50.))
    assert clamp_logit_scale_(scale) is scale and scale.requires_grad
    assert scale.item() == pytest.approx(math.log(100))
    assert clamp_logit_scale_(torch.tensor(-5.)).item() == -5.
    assert clamp_logit_scale_(torch.tensor(5.), max_scale=10).item() == pytest.approx(math.log(10))


@pytest.mark.parametrize("args, text", [
    ((unit(6, 8), unit(5, 8), 2.), "do not pair up"), ((unit(6, 8), unit(6, 7), 2.), "do not pair up"),
    ((unit(8), unit(8), 2.), "do not pair up"), ((unit(2, 6, 8), unit(2, 6, 8), 2.), "do not pair up"),
    ((unit(1, 8), unit(1, 8), 2.), "no negatives"), ((unit(0, 8), unit(0, 8), 2.), "no negatives"),
    ((unit(6, 8), unit(6, 8), 2., [1, 2]), "one id per pair"), ((unit(6, 8), unit(6, 8), 2., torch.zeros(6, 1)), "one id per pair")])
def test_errors(args, text):
    with pytest.raises(LabError, match=text): info_nce(*args)


@pytest.mark.parametrize("most", [0, -1, math.nan])
def test_clamp_refuses(most):
    with pytest.raises(LabError, match="above 0"): clamp_logit_scale_(torch.tensor(1.), most)
