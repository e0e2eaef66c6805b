"InfoNCE against judges that share no code with it: pure Python, finite differences, and CLIP's own formula."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.training.loss import (
    _check_loss,
    _clamp_logit_scale_,
    _similarity_logits,
    batch_loss,
    info_nce,
    multi_positive_info_nce,
    siglip_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1
    )


def by_hand(images, texts, scale, ids=None):
    "InfoNCE read off its definition, with Python floats and nothing else."
    images, texts, B = images.tolist(), texts.tolist(), len(images)
    cosine = [[math.fsum(a * b for a, b in zip(i, t)) for t in texts] for i in images]
    counts = lambda i, j: i == j or ids is None or ids[i] != ids[j]
    loss = 0
    for i in range(B):
        by_row = math.fsum(math.exp(scale * (cosine[i][j] - cosine[i][i])) for j in range(B) if counts(i, j))
        by_column = math.fsum(
            math.exp(scale * (cosine[j][i] - cosine[i][i])) for j in range(B) if counts(i, j)
        )
        loss += (math.log(by_row) + math.log(by_column)) / (2 * B)
    return loss


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(2, 9),
    D=st.integers(1, 8),
    scale=st.floats(-3, math.log(100)),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_equals_the_definition(B, D, scale, seed, data):
    images, texts = unit(B, D, seed=seed, dtype=torch.float64), unit(B, D, seed=seed + 1, dtype=torch.float64)
    ids = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=B, max_size=B))
    assert info_nce(images, texts, scale, ids).item() == pytest.approx(
        by_hand(images, texts, math.exp(scale), ids), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("ids", [None, [0, 0, 1, 2, 1]])
def test_gradients_equal_finite_differences(ids):
    inputs = [
        unit(5, 6, dtype=torch.float64).requires_grad_(),
        unit(5, 6, seed=1, dtype=torch.float64).requires_grad_(),
        torch.tensor(1.5, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(lambda i, t, s: info_nce(i, t, s, ids), inputs)


@pytest.mark.parametrize("scale", [0.0, 2.6593, math.log(100)])
@pytest.mark.parametrize("B", [2, 3, 64, 1000])
def test_equal_logits_give_ln_b(B, scale):
    same = unit(1, 16).expand(B, 16)
    torch.testing.assert_close(info_nce(same, same, scale), torch.tensor(math.log(B)))


def test_symmetric_and_blind_to_the_order_of_pairs():
    images, texts, order = unit(20, 8), unit(20, 8, seed=1), torch.randperm(20)
    ids = torch.arange(20) // 2
    loss = info_nce(images, texts, 2.0, ids)
    torch.testing.assert_close(info_nce(texts, images, 2.0, ids), loss)
    torch.testing.assert_close(info_nce(images[order], texts[order], 2.0, ids[order]), loss)


def test_scale_is_a_logarithm_and_divides_by_the_temperature():
    images, texts = unit(7, 8), unit(7, 8, seed=1)
    torch.testing.assert_close(_similarity_logits(images, texts, math.log(1 / 0.07)), images @ texts.T / 0.07)
    for scale in (
        torch.tensor(2.0),
        torch.nn.Parameter(torch.tensor(2.0)),
        torch.nn.Parameter(torch.tensor([2.0])),
        2,
    ):
        torch.testing.assert_close(_similarity_logits(images, texts, scale), math.exp(2) * images @ texts.T)


def test_scale_gets_its_gradient():
    scale = torch.nn.Parameter(torch.tensor(2.0))
    info_nce(unit(7, 8), unit(7, 8), scale).backward()
    assert scale.grad < 0  # matching pairs ask for more scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_for_half_precision_and_under_autocast(dtype):
    images, texts = unit(16, 32).to(dtype), unit(16, 32, seed=1).to(dtype)
    expected = info_nce(images.float(), texts.float(), math.log(100))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(images, texts, math.log(100))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_ids_leave_no_push_between_captions_of_one_image():
    images, texts = unit(6, 8).requires_grad_(), unit(6, 8, seed=1)
    info_nce(
        images, texts, 2.0, [3, 3, 3, 3, 3, 3]
    ).backward()  # one image throughout: nothing left to tell apart
    assert images.grad.abs().max() == 0
    loss = info_nce(unit(6, 8), texts, 2.0, torch.tensor([3, 1, 2, 4, 5, 6]))
    torch.testing.assert_close(loss, info_nce(unit(6, 8), texts, 2.0))


def test_pairs_overfit_to_zero_loss():
    texts, images = (
        unit(32, 16),
        torch.randn(32, 16, generator=torch.Generator().manual_seed(2)).requires_grad_(),
    )
    scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    optimizer = torch.optim.Adam([images, scale], lr=0.05)
    for _ in range(300):
        loss = info_nce(F.normalize(images, dim=-1), texts, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _clamp_logit_scale_(scale)
    assert loss < 1e-3 and scale.exp() <= 100.001


def test_clamp_is_in_place_and_one_sided():
    scale = torch.nn.Parameter(torch.tensor(50.0))
    assert _clamp_logit_scale_(scale) is scale and scale.requires_grad
    assert scale.item() == pytest.approx(math.log(100))
    assert _clamp_logit_scale_(torch.tensor(-5.0)).item() == -5.0
    assert _clamp_logit_scale_(torch.tensor(5.0), max_scale=10).item() == pytest.approx(math.log(10))


# the variants, each against nested loops of Python floats


def cosines(images, texts):
    return [[math.fsum(a * b for a, b in zip(i, t)) for t in texts.tolist()] for i in images.tolist()]


def log_softmax(row):
    top = max(row)
    return [x - top - math.log(math.fsum(math.exp(y - top) for y in row)) for x in row]


def smoothed_by_hand(images, texts, scale, ids, smoothing):
    "Every anchor wants 1 − ε for its positive and ε/K for each of the K candidates that are left."
    cosine, B, loss = cosines(images, texts), len(images), 0
    for rows in (cosine, list(zip(*cosine))):
        for i, row in enumerate(rows):
            left = [j for j in range(B) if j == i or ids is None or ids[j] != ids[i]]
            log_p = dict(zip(left, log_softmax([scale * row[j] for j in left])))
            loss -= math.fsum(((1 - smoothing) * (j == i) + smoothing / len(left)) * log_p[j] for j in left)
    return loss / (2 * B)


def multi_positive_by_hand(images, texts, scale, image_ids, text_ids, smoothing=0.0):
    cosine, loss = cosines(images, texts), 0
    for rows, mine, theirs in ((cosine, image_ids, text_ids), (list(zip(*cosine)), text_ids, image_ids)):
        for i, row in enumerate(rows):
            log_p, right = (
                log_softmax([scale * x for x in row]),
                [j for j, other in enumerate(theirs) if other == mine[i]],
            )
            loss -= (1 - smoothing) * math.fsum(log_p[j] for j in right) / len(right) / len(
                rows
            ) / 2 + smoothing * math.fsum(log_p) / len(row) / len(rows) / 2
    return loss


def siglip_by_hand(images, texts, scale, bias, image_ids, text_ids):
    loss = 0
    for i, row in enumerate(cosines(images, texts)):
        for j, x in enumerate(row):
            z = (scale * x + bias) * (1 if image_ids[i] == text_ids[j] else -1)
            loss += math.log1p(math.exp(-z)) if z > -30 else -z
    return loss / len(images)


@st.composite
def several_captions(draw):
    "Images of which some show the same, at least one caption for each, in any order."
    image_ids = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    more = draw(st.lists(st.sampled_from(image_ids), max_size=6))
    text_ids = draw(st.permutations(sorted(set(image_ids)) + more))
    return image_ids, list(text_ids), draw(st.integers(0, 999))


def embedded(image_ids, text_ids, seed):
    return unit(len(image_ids), 5, seed=seed, dtype=torch.float64), unit(
        len(text_ids), 5, seed=seed + 1, dtype=torch.float64
    )


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(2, 9),
    scale=st.floats(-3, math.log(100)),
    smoothing=st.floats(0, 0.99),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_label_smoothing_equals_the_definition(B, scale, smoothing, seed, data):
    images, texts = unit(B, 4, seed=seed, dtype=torch.float64), unit(B, 4, seed=seed + 1, dtype=torch.float64)
    ids = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=B, max_size=B))
    loss = info_nce(images, texts, scale, ids, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(
        smoothed_by_hand(images, texts, math.exp(scale), ids, smoothing), rel=1e-9, abs=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(several_captions(), st.floats(-3, math.log(100)), st.sampled_from([0.0, 0.2]))
def test_multi_positive_equals_the_definition(captions, scale, smoothing):
    image_ids, text_ids, seed = captions
    images, texts = embedded(*captions)
    loss = multi_positive_info_nce(images, texts, scale, image_ids, text_ids, smoothing)
    assert loss.item() == pytest.approx(
        multi_positive_by_hand(images, texts, math.exp(scale), image_ids, text_ids, smoothing),
        rel=1e-9,
        abs=1e-9,
    )


@settings(max_examples=60, deadline=None)
@given(several_captions(), st.floats(-3, math.log(100)), st.floats(-12, 3))
def test_siglip_equals_the_definition(captions, scale, bias):
    image_ids, text_ids, seed = captions
    images, texts = embedded(*captions)
    loss = siglip_loss(images, texts, scale, bias, image_ids, text_ids)
    assert loss.item() == pytest.approx(
        siglip_by_hand(images, texts, math.exp(scale), bias, image_ids, text_ids), rel=1e-9, abs=1e-9
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda i, t, s, b: info_nce(i, t, s, [0, 0, 1, 2], label_smoothing=0.2),
        lambda i, t, s, b: siglip_loss(i, t, s, b, [0, 0, 1, 2]),
        lambda i, t, s, b: multi_positive_info_nce(
            i, t[[0, 1, 2, 3, 0]], s, [0, 1, 1, 2], [0, 1, 1, 2, 2], 0.1
        ),
    ],
)
def test_gradients_of_the_variants_equal_finite_differences(loss):
    inputs = [
        unit(4, 5, dtype=torch.float64),
        unit(4, 5, seed=1, dtype=torch.float64),
        torch.tensor(1.5, dtype=torch.float64),
        torch.tensor(-3.0, dtype=torch.float64),
    ]
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


def test_smoothing_of_nothing_left_is_finite():
    images, texts = unit(4, 5).requires_grad_(), unit(4, 5, seed=1)
    loss = info_nce(images, texts, math.log(100), [3, 3, 3, 3], label_smoothing=0.5)
    loss.backward()
    assert loss == 0 and images.grad.abs().max() == 0


def test_no_smoothing_gives_the_bits_of_before():
    images, texts = unit(40, 16), unit(40, 16, seed=1)
    logits, target = _similarity_logits(images, texts, 2.66), torch.arange(40)
    assert torch.equal(
        info_nce(images, texts, 2.66),
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2,
    )
    torch.testing.assert_close(
        info_nce(images, texts, 2.66, label_smoothing=0.1),
        (
            F.cross_entropy(logits, target, label_smoothing=0.1)
            + F.cross_entropy(logits.T, target, label_smoothing=0.1)
        )
        / 2,
    )


def test_one_caption_each_is_info_nce():
    images, texts = unit(20, 8), unit(20, 8, seed=1)
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            multi_positive_info_nce(images, texts, 2.0, range(20), range(20), smoothing),
            info_nce(images, texts, 2.0, label_smoothing=smoothing),
        )
    order = torch.randperm(20)
    torch.testing.assert_close(
        multi_positive_info_nce(images, texts[order], 2.0, range(20), order), info_nce(images, texts, 2.0)
    )  # captions in any order


def test_equal_logits_of_several_captions():
    "ln M towards the captions, ln N towards the images."
    same = unit(1, 8)
    loss = multi_positive_info_nce(same.expand(4, 8), same.expand(12, 8), 2.0, range(4), torch.arange(12) % 4)
    torch.testing.assert_close(loss, torch.tensor((math.log(12) + math.log(4)) / 2))


def test_siglip_starts_at_what_its_paper_says():
    """With the bias of −10 and nothing learned, the pairs that match are nearly all of the loss: about 10
    an image."""
    orthogonal = torch.eye(64)
    loss = siglip_loss(orthogonal, orthogonal.roll(1, 0), math.log(10), -10.0)
    torch.testing.assert_close(
        loss, torch.tensor(math.log1p(math.exp(10)) + math.log1p(1.0) + 62 * math.log1p(math.exp(-10)))
    )
    images, texts, ids = unit(6, 8), unit(6, 8, seed=1), [0, 0, 1, 2, 3, 4]
    torch.testing.assert_close(
        siglip_loss(images, texts, 2.0, -5.0, ids), siglip_loss(texts, images, 2.0, -5.0, ids)
    )
    torch.testing.assert_close(
        siglip_loss(images, texts, 2.0, -5.0), siglip_loss(images, texts, 2.0, -5.0, range(6))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "loss",
    [
        lambda i, t: multi_positive_info_nce(i, t, math.log(100), range(16), range(16)),
        lambda i, t: siglip_loss(i, t, math.log(100), -10.0),
    ],
)
def test_variants_compute_in_float32_too(loss, dtype):
    images, texts = unit(16, 32).to(dtype), unit(16, 32, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(images, texts)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(images.float(), texts.float()), rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["multi-positive", "siglip"])
def test_variants_overfit(loss):
    config, texts = LabConfig.from_preset("tiny", loss=loss), unit(32, 16)
    images, scale, bias = (
        torch.randn(32, 16, generator=torch.Generator().manual_seed(2)).requires_grad_(),
        torch.nn.Parameter(torch.tensor(math.log(10))),
        torch.nn.Parameter(torch.tensor(-10.0)),
    )
    optimizer = torch.optim.Adam([images, scale, bias], lr=0.05)
    for _ in range(300):
        value = batch_loss(config, F.normalize(images, dim=-1), texts, scale, range(32), logit_bias=bias)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        _clamp_logit_scale_(scale)
    assert value < 0.02


def test_the_configuration_picks():
    images, texts, tiny = unit(6, 8), unit(6, 8, seed=1), LabConfig.from_preset("tiny")
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    pick = lambda **changes: batch_loss(
        tiny.replace(**changes), images, texts, 2.0, ids, logit_bias=torch.tensor(-5.0)
    )
    assert torch.equal(pick(), info_nce(images, texts, 2.0, ids))
    assert torch.equal(pick(label_smoothing=0.1), info_nce(images, texts, 2.0, ids, label_smoothing=0.1))
    assert torch.equal(
        pick(loss="multi-positive", label_smoothing=0.1),
        multi_positive_info_nce(images, texts, 2.0, ids, ids, 0.1),
    )
    assert torch.equal(pick(loss="siglip"), siglip_loss(images, texts, 2.0, -5.0, ids, ids))
    texts, text_ids = unit(12, 8, seed=1), ids.repeat_interleave(2)
    for loss, expected in {
        "multi-positive": multi_positive_info_nce(images, texts, 2.0, ids, text_ids),
        "siglip": siglip_loss(images, texts, 2.0, -5.0, ids, text_ids),
    }.items():
        assert torch.equal(
            batch_loss(
                tiny.replace(loss=loss, captions_per_image=2), images, texts, 2.0, ids, text_ids, -5.0
            ),
            expected,
        )
    torch.testing.assert_close(
        batch_loss(tiny, images, texts[:6], 2.0, ids, ids), info_nce(images, texts[:6], 2.0, ids)
    )


@pytest.mark.parametrize(
    "changes, more, text",
    [
        (dict(loss="siglip"), {}, "needs a logit_bias"),
        (dict(loss="siglip", label_smoothing=0.1), dict(logit_bias=-10.0), "no row to spread it over"),
        (dict(captions_per_image=2), {}, "one caption for each image"),
        ({}, dict(text_image_ids=[0, 1, 2, 3, 5, 4]), "row by row"),
        (dict(loss="multi-positive"), dict(text_image_ids=[0, 1, 2, 3, 4, 4]), "no caption in the batch"),
        (dict(loss="multi-positive"), dict(text_image_ids=[0, 1]), "do not fit"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, more, text):
    config = LabConfig.from_preset("tiny", **changes)
    with pytest.raises(LabError, match=text):
        batch_loss(config, unit(6, 8), unit(6, 8, seed=1), 2.0, range(6), **more)


def test_a_configuration_can_be_checked_before_any_work():
    tiny = LabConfig.from_preset("tiny")
    for changes in (
        {},
        dict(label_smoothing=0.1),
        dict(loss="siglip", captions_per_image=5),
        dict(loss="multi-positive", captions_per_image=5, label_smoothing=0.1),
    ):
        _check_loss(tiny.replace(**changes))
    for changes in (dict(captions_per_image=5), dict(loss="siglip", label_smoothing=0.1)):
        with pytest.raises(LabError):
            _check_loss(tiny.replace(**changes))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_smoothing_refuses(smoothing):
    with pytest.raises(LabError, match="label_smoothing"):
        info_nce(unit(6, 8), unit(6, 8), 2.0, label_smoothing=smoothing)


@pytest.mark.parametrize(
    "images, texts, text",
    [
        (unit(6, 8), unit(6, 7), "cannot be compared"),
        (unit(8), unit(8), "cannot be compared"),
        (unit(0, 8), unit(0, 8), "nothing to compare"),
    ],
)
def test_sides_that_cannot_be_compared(images, texts, text):
    with pytest.raises(LabError, match=text):
        siglip_loss(images, texts, 2.0, -5.0)
    with pytest.raises(LabError, match=text):
        multi_positive_info_nce(images, texts, 2.0, range(len(images)), range(len(texts)))


@pytest.mark.parametrize(
    "args, text",
    [
        ((unit(6, 8), unit(5, 8), 2.0), "do not pair up"),
        ((unit(6, 8), unit(6, 7), 2.0), "do not pair up"),
        ((unit(8), unit(8), 2.0), "do not pair up"),
        ((unit(2, 6, 8), unit(2, 6, 8), 2.0), "do not pair up"),
        ((unit(1, 8), unit(1, 8), 2.0), "no negatives"),
        ((unit(0, 8), unit(0, 8), 2.0), "no negatives"),
        ((unit(6, 8), unit(6, 8), 2.0, [1, 2]), "one id per pair"),
        ((unit(6, 8), unit(6, 8), 2.0, torch.zeros(6, 1)), "one id per pair"),
    ],
)
def test_errors(args, text):
    with pytest.raises(LabError, match=text):
        info_nce(*args)


@pytest.mark.parametrize("most", [0, -1, math.nan])
def test_clamp_refuses(most):
    with pytest.raises(LabError, match="above 0"):
        _clamp_logit_scale_(torch.tensor(1.0), most)
