"""The machinery of claims on made-up arms whose truth is known, and planted faults that it has to notice."""

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

import clip475.studies.held_out as held_out
from clip475.core.files import LabError
from clip475.data.scenes import _Caption, _Mention
from clip475.studies.arms import _choose_rate, _kin_first
from clip475.studies.claims import (
    _LEVEL,
    _Claim,
    _family,
    _holm,
    _interval,
    _judge,
    _parts_of,
    _power,
    _smallest_found,
    verdicts,
)
from clip475.studies.freezing import _FIRST_ARMS, _planned_runs
from clip475.studies.held_out import _NOVELTIES, _make_data, _Scale

torch = pytest.importorskip("torch")
COUNT, SEEDS, REPETITIONS = 9, 5, 200
CLAIMS = [_Claim(str(i), "", "", "a", "b", lambda r, i=i: r["values"][i]) for i in range(COUNT)]
NANO = _Scale(24, 12, 12, 32, 12, 1, 2, (1,), 2)


def made_up(generator: np.random.Generator, effects: np.ndarray) -> dict:
    "Arms a and b with one quantity for each claim: what a seed does, plus noise, plus the effect in a."
    runs = []
    for seed in range(SEEDS):
        shared = 3 * generator.normal(size=COUNT)
        for arm, shift in (("a", effects), ("b", 0)):
            noise = generator.normal(size=COUNT) / 2**0.5  # so that differences deviate by 1
            runs.append({"arm": arm, "seed": seed, "values": shared + shift + noise})
    return {"results": runs}


# ── no effect, and an effect of known size ──


def test_without_any_effect_a_family_errs_in_one_of_twenty_repetitions():
    generator = np.random.default_rng(1)
    corrected = alone = 0
    for _ in range(REPETITIONS):
        judged = _judge(CLAIMS, made_up(generator, np.zeros(COUNT)))
        corrected += (judged.verdict != "not decided").any()
        alone += sum(_excludes_zero(row) for _, row in judged.iterrows()) > 0
    assert binomtest(int(corrected), REPETITIONS, _LEVEL, alternative="greater").pvalue > 0.01
    assert binomtest(int(alone), REPETITIONS, _LEVEL, alternative="greater").pvalue < 1e-6  # it would notice


def _excludes_zero(row) -> bool:
    return row.low > 0 or row.high < 0


@pytest.mark.parametrize("effect", [1.0, 2.0, 3.5])
def test_an_effect_is_found_as_often_as_the_power_says(effect):
    generator, found = np.random.default_rng(2), 0
    for _ in range(REPETITIONS):
        judged = _judge(CLAIMS[:1], made_up(generator, np.full(COUNT, effect)))
        found += judged.verdict.iloc[0] == "supported"
    assert binomtest(found, REPETITIONS, _power(effect, 1, SEEDS, _LEVEL)).pvalue > 0.01


def test_in_a_family_the_stated_difference_is_found_at_least_as_often_as_stated():
    effect = _smallest_found(SEEDS, _LEVEL / COUNT)
    effects = np.zeros(COUNT)
    effects[4] = effect
    generator, found, wrong = np.random.default_rng(3), 0, 0
    for _ in range(REPETITIONS):
        words = _judge(CLAIMS, made_up(generator, effects)).verdict
        found += words["4"] == "supported"
        wrong += (words.drop("4") != "not decided").any()
    assert binomtest(found, REPETITIONS, 0.8, alternative="less").pvalue > 0.01
    assert binomtest(int(wrong), REPETITIONS, _LEVEL, alternative="greater").pvalue > 0.01


def test_the_sign_of_a_claim_decides_between_supported_and_contradicted():
    big = made_up(np.random.default_rng(4), np.full(COUNT, 30.0))
    more = _Claim("more", "", "", "a", "b", lambda r: r["values"][0])
    less = _Claim("less", "", "", "a", "b", lambda r: r["values"][0], less=True)
    assert _judge([more, less], big).verdict.tolist() == ["supported", "contradicted"]


# ── the parts of the machinery ──


def test_holm_by_hand_and_in_any_order():
    p = [0.01, 0.04, 0.03, 0.005]
    assert np.allclose(_holm(p), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(_holm(p[::-1]), _holm(p)[::-1])
    assert _holm([0.9, 0.8]) == [1, 1]


def test_intervals_are_students():
    middle, low, high = _interval([1.0, 2.0, 4.0])
    np.testing.assert_allclose((low, high), ttest_1samp([1, 2, 4], 0).confidence_interval(0.95), rtol=1e-12)
    assert abs(middle - 7 / 3) < 1e-12 and _interval([3.0])[1:] == (None, None)


def test_power_grows_with_effect_and_seeds_and_is_the_level_without_effect():
    assert _power(0, 1, 5, 0.05) == 0.05
    assert _power(1, 1, 5, 0.05) < _power(2, 1, 5, 0.05) < _power(2, 1, 10, 0.05)
    assert _power(3 * _smallest_found(5, 0.01), 3, 5, 0.01) == pytest.approx(0.8)


@pytest.mark.parametrize("values", [[[1.0]], [[1.0], [2.0]], [[0.0]] * 5, [[2.0]] * 5])
def test_too_few_seeds_and_differences_without_spread_decide_nothing(values):
    runs = [{"arm": "a", "seed": s, "values": v} for s, v in enumerate(values)]
    runs += [{"arm": "b", "seed": s, "values": [0.0]} for s in range(len(values))]
    assert _judge(CLAIMS[:1], {"results": runs}).verdict.tolist() == ["not decided"]


def test_a_claim_of_which_an_arm_was_not_run_is_not_decided_and_still_counts():
    big = made_up(np.random.default_rng(5), np.full(COUNT, 2.5))
    missing = _Claim("missing", "", "", "a", "c", lambda r: 0)
    alone, beside = _judge(CLAIMS[:1], big), _judge([CLAIMS[0], *[missing] * 8], big)
    assert beside.verdict["missing"].eq("not decided").all() and beside.seeds["missing"].eq(0).all()
    assert beside.p["0"] == pytest.approx(min(1, 9 * alone.p["0"]))


def test_only_seeds_that_both_arms_have_are_compared():
    result = made_up(np.random.default_rng(6), np.zeros(COUNT))
    result["results"].pop()  # b with the last seed
    assert _judge(CLAIMS[:1], result).seeds.tolist() == [SEEDS - 1]


def fake_run(arm: str, seed: int, shift: float) -> dict:
    final = {g: {"i2t": 0.3, "t2i": 0.3 + shift, "kin": 0.5, "choice": 0.4 + shift} for g in _NOVELTIES}
    blocks = {"step": [1, 2], "image_gradient": [1, 1], "image_gradient_sd": [0.1, 0.1 + seed / 100]}
    points = [{"step": s, "seconds": float(s), "i2t": 0.1, "t2i": 0.1 + shift} for s in (0, 2)]
    return {"arm": arm, "seed": seed, "final": final, "blocks": blocks, "points": points, "seconds": 2.0}


def fake_result() -> dict:
    noise = np.random.default_rng(7).normal(size=(len(_FIRST_ARMS), SEEDS)) / 100
    return {
        "results": [
            fake_run(arm, seed, 0.2 * (arm == "spec") + noise[i, seed])
            for i, arm in enumerate(_FIRST_ARMS)
            for seed in range(SEEDS)
        ]
    }


def test_the_family_gives_each_claim_one_of_three_words_and_shows_its_parts():
    result = fake_result()
    found = verdicts(result)
    assert set(found.verdict) <= {"supported", "contradicted", "not decided"}
    assert len(found) == len(_family(result)) and found.loc["6 adaptation helps", "verdict"] == "supported"
    claim = next(claim for claim in _family(result) if claim.name == "5 frozen text generalises")
    assert [*_parts_of(claim, result).index] == [claim.quantity, *_NOVELTIES]


def test_photographs_have_no_questions_and_the_family_takes_recall():
    result = fake_result()
    for run in result["results"]:
        run["final"] = {name: {"t2i": 0.1, "kin": 0.2} for name in ("seen", "coco")}
    assert "recall on what was left out" in [claim.quantity for claim in _family(result)]


def test_the_arms_that_claims_compare_come_first_with_all_seeds():
    compared = {arm for claim in _family(fake_result()) for arm in (claim.arm, claim.other)}
    assert compared == set(_FIRST_ARMS)
    planned = [(arm.name, seed) for arm, seed in _planned_runs(_Scale(*[1] * 7, (1, 2), 1))]
    assert {name for name, _ in planned[: 2 * len(_FIRST_ARMS)]} == compared


def test_of_equal_scores_the_smallest_rate_is_taken():
    trials = [
        {"rate": r, "text_rate": t, "score": s} for r, t, s in ((3, 1, 0.2), (1, 0.1, 0.3), (1, 1, 0.3))
    ]
    assert _choose_rate(trials) == (1, 0.1)


def test_kin_first_by_hand():
    angles = torch.deg2rad(torch.tensor([0.0, 5, 90, 6]))  # 0 lies next to 1, its kin; 1 lies next to 3
    texts = torch.stack([angles.cos(), angles.sin()], 1)
    owner = torch.tensor([0, 0, 1, 1])
    assert (
        _kin_first(texts, owner, torch.tensor([0])) == 1
        and _kin_first(texts, owner, torch.tensor([1, 3])) == 0
    )
    assert _kin_first(torch.ones(4, 2), owner, torch.arange(4)) == 0  # ties count as lost


# ── planted faults: questions that ask about something else ──


def test_questions_test_what_is_held_out():
    data = _make_data(NANO)
    assert {"colour", "kind", "combination", "relation"} <= set(data.questions)
    for row, options in data.questions["colour"]:
        assert "purple" in options[0] and not any("purple" in other for other in options[1:])
        assert data.group[row] == "colour"


def test_a_question_about_the_first_colour_instead_of_the_held_out_one_is_refused(monkeypatch):
    monkeypatch.setitem(held_out._ABOUT, "colour", lambda mention: mention.colour is not None)
    monkeypatch.setitem(held_out._ABOUT, "combination", lambda mention: mention.colour is not None)
    with pytest.raises(LabError, match="does not test what '(colour|combination)' holds out"):
        _make_data(NANO)


def caption(text: str, *mentions: tuple, relation=None) -> _Caption:
    return _Caption(text, tuple(_Mention(*mention) for mention in mentions), relation, None)


def test_options_keep_the_grammar_and_leave_places_alone():
    purple = caption(
        "A purple boat under a car.", ("vehicles", "boat", "purple", 1), ("vehicles", "car", None, 1)
    )
    texts = [option.text for option in held_out._alternatives(purple, "colour")]
    assert "an orange boat under a car." in texts and not any("a orange" in text for text in texts)
    stars = caption("A cat beneath a dog under the stars", relation="below")
    assert held_out._alternatives(stars, "relation")[1].text == "a cat higher than a dog under the stars"


def test_an_option_that_is_also_true_of_the_picture_is_left_out():
    data = _make_data(_Scale(24, 12, 40, 32, 12, 1, 2, (1,), 2))
    scenes = held_out._collect_scenes(42, held_out._VAL_START, data.scale.gallery())
    gallery = [scene for some in scenes.values() for scene in some]
    for row, options in data.questions["kind"]:
        other_kinds = {thing.kind for thing in gallery[row].things} - {"elephant"}
        alone = "and" not in options[0].split() and len(other_kinds) == 1
        single = sum(kind in options[0] for kind in held_out._KINDS) == 1
        if alone and single and not gallery[row].relation:
            assert not any(kind in option.split() for kind in other_kinds for option in options[1:])
