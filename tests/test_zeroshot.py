"Words to classes: judged by loops, by scikit-learn where it is installed, and fed with nonsense."

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import multinomial

from clip475.core.config import LabConfig
from clip475.core.files import error_message
from clip475.data.tokens import load_tokenizer
from clip475.evaluation.zeroshot import (
    TEMPLATES,
    _per_class_recall,
    _zero_shot,
    calibration,
    class_embeddings,
    classify,
    confusion_matrix,
    mean_interval,
)
from clip475.models.text import encode_texts, load_text_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tower():
    return load_text_encoder(LabConfig()), load_tokenizer()


def random_unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# classes
def test_the_average_of_templates_is_a_unit_vector_again(tower):
    classes = ["a dog", "two red boats", "a man in blue"]
    found = class_embeddings(classes, *tower)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    by_hand = torch.stack(
        [
            F.normalize(
                torch.stack([encode_texts(t.replace("{}", c), *tower)[0] for t in TEMPLATES]).mean(0), dim=0
            )
            for c in classes
        ]
    )
    torch.testing.assert_close(found, by_hand)


def test_without_the_last_normalisation_a_class_would_lose(tower):
    """Two classes that a picture likes equally.

    The one whose templates disagree scores lower if its mean is left short."""
    templates = ["{}", "{} in the snow at night under the moon with two green elephants"]
    texts = [encode_texts([t.replace("{}", "a dog") for t in templates], *tower).mean(0)]
    assert texts[0].norm() < 0.99
    assert class_embeddings(["a dog"], *tower, templates=templates).norm().item() == pytest.approx(
        1, abs=1e-6
    )


def test_braces_in_a_class_name_are_text(tower):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(
            class_embeddings(["a {0} dog", "a cat"], *tower, templates=["{}"]),
            encode_texts(["a {0} dog", "a cat"], *tower),
        )


def test_a_class_is_the_same_in_any_company(tower):
    alone_, together = (
        class_embeddings(["a dog"], *tower),
        class_embeddings(["a cat", "a dog", "three pink balloons"], *tower),
    )
    torch.testing.assert_close(alone_[0], together[1])


BAD_CLASSES = [
    ([], "no classes"),
    ("a dog", "single text"),
    (["a dog", ""], "class 1 is empty"),
    (["a dog", " \n "], "class 1 is empty"),
    (["a dog", "a cat", "A DOG "], "classes 0 and 2 are the same"),
    (["a dog", "狗"], "never saw any"),
    (["🐶", "a cat"], "never saw any"),
    (["собака"], "never saw any"),
    (["a dog", None], "is no text"),
    (["a dog", 3], "is no text"),
]


@pytest.mark.parametrize("classes, said", BAD_CLASSES)
def test_bad_classes_get_one_sentence(tower, classes, said):
    message = error_message(said, class_embeddings, classes, *tower)
    assert "\n" not in message and len(message) < 240


@pytest.mark.parametrize(
    "templates, said",
    [
        ([], "no templates"),
        (["a picture"], "no {}"),
        (["{}", None], "no {}"),
        (["{0}"], "no {}"),
        ("a picture of", "no {}"),
    ],
)
def test_bad_templates_get_one_sentence(tower, templates, said):
    error_message(said, class_embeddings, ["a dog"], *tower, templates=templates)


def test_a_long_class_is_said_and_used(tower):
    with pytest.warns(UserWarning, match="class 1.*77 tokens.*cut off"):
        found = class_embeddings(["a boat", "a dog " + "and a cat " * 33], *tower)
    assert found.shape == (2, 512) and found.isfinite().all()


def test_two_classes_that_differ_only_where_they_are_cut_off_are_refused(tower):
    long = "a dog " + "and a cat " * 33
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error_message(
            "the same to the text tower", class_embeddings, [long + "in the snow", long + "at night"], *tower
        )


def test_classes_that_fit_exactly_are_not_said_to_be_cut(tower):
    words = "a" + " a" * 74  # 75 tokens and two marks: 77
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        class_embeddings([words, "a dog"], *tower, templates=["{}"])
    with pytest.warns(UserWarning, match="cut off"):
        class_embeddings([words + " a", "a dog"], *tower, templates=["{}"])


def test_an_unknown_word_among_known_ones_is_said(tower):
    with pytest.warns(UserWarning, match="'zebra'"):
        class_embeddings(["a zebra", "a dog"], *tower)


# probabilities
def test_probabilities_are_the_softmax_under_the_temperature():
    images, classes, scale = random_unit(40, 16), random_unit(7, 16, seed=1), torch.tensor(2.6)
    probabilities, labels = classify(images, classes, scale, k=7)
    wanted = (images.double() @ classes.double().T * scale.exp().double()).softmax(1)
    torch.testing.assert_close(probabilities.double(), wanted.gather(1, labels), atol=1e-5, rtol=1e-5)
    assert labels.sort(1)[0].equal(torch.arange(7).repeat(40, 1)) and (probabilities.diff(dim=1) <= 0).all()
    few, few_labels = classify(images, classes, scale, k=2)
    assert few.equal(probabilities[:, :2]) and few_labels.equal(labels[:, :2])


def test_the_length_of_embeddings_does_not_matter_and_ties_go_by_the_list():
    images, classes = random_unit(5, 8), random_unit(4, 8, seed=1)
    torch.testing.assert_close(
        classify(3 * images, classes / 7, 2.6, 4)[0], classify(images, classes, 2.6, 4)[0]
    )
    assert classify(images[:1], images[:1].repeat(4, 1), 2.6, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_a_large_scale_does_not_overflow():
    probabilities, _ = classify(random_unit(5, 8), random_unit(4, 8, seed=1), 11.9, 4)
    assert probabilities.isfinite().all() and torch.allclose(probabilities.sum(1), torch.ones(5))


def test_bad_embeddings_scales_and_k_get_one_sentence():
    images, classes = random_unit(5, 8), random_unit(4, 8, seed=1)
    broken = images.clone()
    broken[3, 1] = torch.nan
    error_message("image_embeddings: row 3 holds NaN", classify, broken, classes, 2.6, 2)
    error_message("class_embeddings: row 3 holds NaN", classify, images, broken[:4], 2.6, 2)
    error_message("the same model", classify, images, random_unit(4, 9), 2.6, 2)
    error_message("one row per item", classify, images[0], classes, 2.6, 2)
    for k in (5, 0, -1, 2.0, True):
        error_message("there are 4 classes", classify, images, classes, 2.6, k)
    for scale in (14.3, float("nan"), float("inf")):
        error_message("ln(1/τ)", classify, images, classes, scale, 2)


def test_zero_shot_is_the_two_steps_in_one(tower):
    model = type("Model", (), dict(text_encoder=tower[0], logit_scale=torch.tensor(2.6)))
    images, names = random_unit(6, 512), ["a dog", "a cat", "a bus"]
    found = _zero_shot(images, names, model, tower[1])
    probabilities, labels = classify(images, class_embeddings(names, *tower), 2.6, 3)
    assert [[n for n, _ in row] for row in found] == [[names[c] for c in row] for row in labels.tolist()]
    assert (
        found[2][0][1] == pytest.approx(probabilities[2, 0].item())
        and len(_zero_shot(images, names, model, tower[1], k=1)[0]) == 1
    )


# counting
def test_confusion_and_recall_by_counting():
    generator = np.random.default_rng(1)
    truth, guess = generator.integers(0, 5, 400), generator.integers(0, 6, 400)
    matrix = confusion_matrix(truth, guess, 6)
    assert all(
        matrix[t, g] == sum((a, b) == (t, g) for a, b in zip(truth, guess))
        for t in range(6)
        for g in range(6)
    )
    recall = _per_class_recall(matrix)
    assert np.isnan(recall[5]) and all(recall[t] == np.mean(guess[truth == t] == t) for t in range(5))
    error_message("one label each", confusion_matrix, [0, 1], [0], 2)
    error_message("guess holds the label 2", confusion_matrix, [0, 1], [0, 2], 2)
    error_message("truth holds the label -1", confusion_matrix, [0, -1], [0, 1], 2)


def test_scikit_learn_counts_the_same():
    sklearn = pytest.importorskip("sklearn.metrics")
    from sklearn.calibration import calibration_curve

    generator = np.random.default_rng(2)
    truth, guess = generator.integers(0, 5, 400), generator.integers(0, 5, 400)
    assert np.array_equal(
        confusion_matrix(truth, guess, 5), sklearn.confusion_matrix(truth, guess, labels=range(5))
    )
    np.testing.assert_allclose(
        _per_class_recall(confusion_matrix(truth, guess, 5)), sklearn.recall_score(truth, guess, average=None)
    )
    for confidence in (
        generator.random(500),
        generator.integers(0, 11, 500) / 10,
    ):  # the second lies on the edges of the bins
        correct = generator.random(500) < confidence**2
        curve, _ = calibration(confidence, correct)
        share, mean = calibration_curve(correct, confidence, n_bins=10)
        np.testing.assert_allclose(curve.accuracy, share)
        np.testing.assert_allclose(curve.confidence, mean)


def test_calibration_error_as_its_definition_reads():
    generator = np.random.default_rng(3)
    confidence = generator.random(300)
    correct = generator.random(300) < 0.5
    error = 0
    for b in range(10):
        inside = [i for i in range(300) if b / 10 < confidence[i] <= (b + 1) / 10]
        if inside:
            error += len(inside) / 300 * abs(np.mean(correct[inside]) - np.mean(confidence[inside]))
    curve, found = calibration(confidence, correct)
    assert found == pytest.approx(error) and curve.pictures.sum() == 300
    assert calibration([0.0, 1.0], [0, 1])[1] == 0
    error_message("outside 0…1", calibration, [1.2], [True])
    error_message("outside 0…1", calibration, [float("nan")], [True])
    error_message("one value each", calibration, [0.5, 0.5], [True])
    error_message("one value each", calibration, [], [])


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator, held = np.random.default_rng(4), 0
    for i in range(300):
        _, low, high = mean_interval(generator.random(200) < 0.3, draws=1000, seed=i)
        held += low <= 0.3 <= high
    assert 0.90 <= held / 300 <= 0.98
    assert mean_interval([1] * 20) == pytest.approx((1, 20 / (20 + 1.959964**2), 1))  # Wilson 1927
    assert mean_interval([0] * 20)[1:] == pytest.approx((0, 1 - 20 / (20 + 1.959964**2)))
    assert mean_interval([2, 2, 2]) == (2, 2, 2)
    error_message("no values", mean_interval, [])


def paired(wins, losses, n):
    "The outcomes of two models on n pictures."
    alike = [0] * (n - wins - losses)
    return [1] * wins + [0] * losses + alike, [0] * wins + [1] * losses + alike


@pytest.mark.parametrize(
    "wins, losses, n", [(12, 2, 50), (0, 0, 20), (20, 0, 20), (1, 0, 44), (0, 5, 30), (7, 7, 15), (1, 0, 1)]
)
def test_a_paired_interval_is_the_differences_that_a_score_test_keeps(wins, losses, n):
    """Against the test itself (Tango 1998), whose nuisance parameter is searched here on a grid.

    Kept is a difference d if (observed − d)² ≤ z² · its variance at the likeliest table with difference d."""
    rare = np.linspace(0, 1, 4001)  # the probability of a loss
    grid, kept = np.linspace(-1, 1, 2001), []
    for d in grid:
        win = rare + d
        possible = (win >= -1e-12) & (rare + win <= 1 + 1e-12)
        loss, win = rare[possible], win[possible].clip(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [(wins, win), (losses, loss), (n - wins - losses, (1 - win - loss).clip(0))]
            likelihood = sum(count * np.log(p) if count else 0 * p for count, p in parts)
        best = np.nanargmax(likelihood)
        variance = (win[best] + loss[best] - d**2) / n
        if ((wins - losses) / n - d) ** 2 <= 3.8415 * variance + 1e-9:
            kept.append(d)
    found = mean_interval(*paired(wins, losses, n))
    assert found[0] == (wins - losses) / n
    assert found[1:] == pytest.approx((min(kept), max(kept)), abs=0.003)
    turned = mean_interval(*paired(losses, wins, n))
    assert turned == pytest.approx((-found[0], -found[2], -found[1]))


def test_a_paired_interval_is_no_point_where_two_models_agree():
    "The bootstrap gave [0, 0]: every sample of pictures without a disagreement has none."
    agreed = mean_interval([1, 0] * 10, [1, 0] * 10)
    assert agreed == pytest.approx((0, -agreed[2], 3.8415 / (20 + 3.8415)), abs=1e-4)
    assert mean_interval([1] * 20, [0] * 20)[1:] == pytest.approx((1 - 2 * 0.16113, 1), abs=0.01)
    assert mean_interval([0.5, 1.0], [0.0, 0.5])[0] == 0.5  # no 0/1 outcomes: the bootstrap
    error_message("the same rows", mean_interval, [1, 0], [1])


def test_a_paired_interval_holds_the_truth_about_as_often_as_it_says():
    "All tables of 40 pictures, weighted, for two models with wins on 8 % of pictures and losses on 2 %."
    weight, held, n = 0.0, 0.0, 40
    for wins in range(16):
        for losses in range(9):
            p = multinomial.pmf([wins, losses, n - wins - losses], n, [0.08, 0.02, 0.90])
            _, low, high = mean_interval(*paired(wins, losses, n))
            weight, held = weight + p, held + p * (low <= 0.06 <= high)
    assert weight > 0.999 and 0.93 < held / weight < 0.98
