"""`clip475 ablate`: what it refuses, that it goes on after a kill, and that it finds what was put in by hand.

Most studies here have made-up trainings, which take no time; a few train for some steps."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clip475 import LabConfig, LabError
from clip475.app.cli import main
from clip475.studies import ablation
from clip475.studies.ablation import Change, run_ablation
from clip475.training.batches import _epoch_captions, prepare_data
from clip475.training.steps import learning_rate_at

ROOT = Path(__file__).parents[1]
IMAGES = 200
SAME = Change("nothing", model=lambda encoder: None)
OTHER = Change("nothing either", model=lambda encoder: None)
TINY = LabConfig.from_preset(
    "tiny", train_images=64, val_images=40, image_size=32, batch_size=16, epochs=1, head_hidden=32
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))


def made_up(study: int = 0, luck: float = 0.02, **gains: float):
    "A training that only draws ranks: the chance of a hit is that of the image, plus the gain of the arm."

    def train(arm, config):
        difficulty = np.random.default_rng(study).uniform(0.1, 0.5, IMAGES)
        rng = np.random.default_rng([study, config.seed, *map(ord, arm.name)])
        chance = np.clip(difficulty + gains.get(arm.name.replace("+", ""), 0) + rng.normal(0, luck), 0, 1)
        drawn = {
            "i2t": np.where(rng.random(IMAGES) < chance, 1, 20),
            "t2i": np.where(rng.random((IMAGES, 5)) < chance[:, None], 1, 20).ravel(),
            "captions": np.full(IMAGES, 5),
        }
        facts = {"steps": 10, "gallery and queries": "made up"}
        texts = {name: " ".join(map(str, each)) for name, each in drawn.items()}
        return {"facts": facts, "ranks": texts, "loss": 1.0, "seconds": 0.0}

    return train


def study(folder, train, seeds=5, **options):
    return run_ablation(TINY, {"A": SAME, "B": OTHER}, folder, seeds, progress=False, train=train, **options)


def test_arms_that_are_the_same_come_out_as_no_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "_write_page", lambda folder, found: None)  # twenty figures take long
    found = [study(tmp_path / str(i), made_up(i), seeds=3)["effects"] for i in range(20)]
    for name in ("A", "B", "interaction"):
        verdicts = [effects[name]["verdict"] for effects in found]
        assert verdicts.count("no difference shown") >= 18


def test_arms_equal_to_the_last_bit_give_exactly_nothing(tmp_path):
    def train(arm, config):
        return made_up(0)(arm._replace(name="none"), config)

    for seeds in (1, 3):
        for effect in study(tmp_path / str(seeds), train, seeds)["effects"].values():
            assert effect["low"] == effect["estimate"] == effect["high"] == 0 and effect["p"] == 1
            assert effect["verdict"] == "no difference shown"


def test_an_interaction_put_in_by_hand_is_found(tmp_path):
    found = study(tmp_path / "up", made_up(A=0.0, B=0.0, AB=0.2))
    assert found["effects"]["interaction"]["verdict"] == "improves"
    assert "gain more together" in found["sentences"][2]
    found = study(tmp_path / "down", made_up(A=0.15, B=0.15, AB=0.1))
    assert found["effects"]["interaction"]["verdict"] == "harms"
    assert "gain less together" in found["sentences"][2]


def test_an_effect_lies_in_its_interval_and_only_the_changed_arm_is_decided(tmp_path):
    found = study(tmp_path / "run", made_up(A=0.1, AB=0.1))
    effect = found["effects"]["A"]
    assert effect["low"] < 0.1 < effect["high"] and effect["verdict"] == "improves"
    assert found["effects"]["B"]["verdict"] == "no difference shown"
    assert found["sentences"][0].startswith("Decided: A (nothing) improves")
    assert "B (nothing either)" in found["sentences"][1]


def test_the_interval_pairs_the_queries(tmp_path):
    "The same hits but for a few: the difference is far more certain than the recall of either arm."

    def train(arm, config):
        result = made_up(0)(arm._replace(name="none"), config)
        if "A" in arm.name:
            result["ranks"]["t2i"] = "1 1 1 1 1 " * 10 + " ".join(result["ranks"]["t2i"].split()[50:])
        return result

    found = study(tmp_path / "run", train)
    effect = found["differences"]["A"]
    assert effect["verdict"] == "improves"
    assert (effect["high"] - effect["low"]) / 2 < 0.6 * found["spread"]["none"]


def only_in(turn: int):
    "A change of the model: it learns in every second step only, in the even ones (0) or the odd ones (1)."

    def halve(encoder):
        for parameter in encoder.parameters():
            steps = itertools.count()

            def forget(parameter, steps=steps):
                if next(steps) % 2 != turn:
                    parameter.grad = None

            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(forget)

    return halve


def test_half_the_steps_and_an_interaction_put_in_by_hand_are_found_in_real_trainings(tmp_path, cache):
    "A and B each leave half of the steps, together they leave none: both harm, and more so together."
    config = TINY.replace(
        train_images=128, val_images=160, batch_size=32, head_hidden=64, epochs=10, learning_rate=3e-3,
        policy="head-only", cache_features=True,
    )  # fmt: skip
    changes = {"A": Change("even steps", model=only_in(0)), "B": Change("odd steps", model=only_in(1))}
    found = run_ablation(config, changes, tmp_path / "run", 4, measure="t2i_R@10", progress=False)
    assert {name: found["differences"][name]["verdict"] for name in "AB"} == {"A": "harms", "B": "harms"}
    assert found["effects"]["interaction"]["verdict"] == "harms"
    assert next(fact for fact in found["equal"] if fact["what"] == "steps")["value"] == 40


def test_another_number_of_steps_or_another_order_is_refused(tmp_path):
    for fact in ("steps", "order of the first 64 images", "initial weights of the backbone", "text tower"):

        def train(arm, config, fact=fact):
            result = made_up()(arm, config)
            return result | {"facts": {fact: arm.name}}

        with pytest.raises(LabError, match=f"arms none and A differ in: {fact}"):
            study(tmp_path / fact, train, seeds=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["val_images=50"], "be measured on another gallery"),
        (["train_images=50"], "be trained on other images"),
        (["epochs=9"], "another number of steps"),
        (["backbone=resnet18"], "begin with other weights"),
        (["head_norm=none"], "what all arms have already"),
        (["head_norm=batch", "head_norm=layer"], "would be both"),
        (["siglip", "label_smoothing"], "arm A\\+B: label_smoothing"),
        (["captions_per_image=2"], "arm A: captions_per_image"),
        (["dropuot"], "is not known; choose one of: augment"),
        (["head_dropout=2"], "it takes a number from 0"),
        (["augment"] * 5, "5 changes make 32 arms"),
    ],
)
def test_changes_that_cannot_be_compared_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(LabError, match=message) as caught:
        run_ablation(TINY, dict(zip("ABCDE", changes)), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_more_changes_make_a_full_factorial_or_one_at_a_time(tmp_path):
    changes = {letter: Change(letter, model=lambda encoder: None) for letter in "ABC"}
    full = run_ablation(TINY, changes, tmp_path / "full", progress=False, train=made_up())
    assert len(full["arms"]) == 8 and list(full["effects"]) == ["A", "B", "C", "A×B", "A×C", "B×C"]
    assert full["comparisons"] == 6
    alone = run_ablation(TINY, changes, tmp_path / "one", 3, True, progress=False, train=made_up())
    assert list(alone["arms"]) == ["none", "A", "B", "C"] and list(alone["effects"]) == ["A", "B", "C"]
    assert alone["sentences"][2] == "Together: no arm has more than one of the changes."


def test_a_killed_study_goes_on_and_ends_alike(tmp_path):
    calls = []

    def counting(arm, config):
        calls.append(arm.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return made_up()(arm, config)

    whole = study(tmp_path / "whole", made_up())
    with pytest.raises(KeyboardInterrupt, match="go on with the same command and --run"):
        study(tmp_path / "cut", counting)
    again = study(tmp_path / "cut", counting)
    assert len(calls) == 21  # twenty trainings and the one that was cut off
    assert {k: v for k, v in again.items() if k != "run"} == {k: v for k, v in whole.items() if k != "run"}
    assert len(study(tmp_path / "cut", made_up(), seeds=6)["seeds"]) == 6  # a seed more in the same folder


def test_another_study_in_the_folder_is_refused(tmp_path):
    study(tmp_path / "run", made_up())
    with pytest.raises(LabError, match="another study"):
        run_ablation(TINY, {"A": "mixup"}, tmp_path / "run", progress=False, train=made_up())
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "metrics.csv").write_text("epoch\n")
    with pytest.raises(LabError, match="holds a run already"):
        study(tmp_path / "trained", made_up())


def test_the_page_is_written_and_shows_names_as_text(tmp_path):
    change = Change("<b>mine</b> | yours", model=lambda encoder: None)
    run_ablation(TINY, {"A": change}, tmp_path / "run", 2, progress=False, train=made_up())
    page = (tmp_path / "run" / "ablation.html").read_text(encoding="utf-8")
    assert "<b>mine" not in page and "&lt;b&gt;mine" in page and 'alt="Recall of each arm' in page
    assert (tmp_path / "run" / "ablation.png").stat().st_size > 5000
    text = (tmp_path / "run" / "ablation.md").read_text(encoding="utf-8")
    assert "What is equal in all arms" in text and "about eight of ten" in text


def test_the_command_prints_what_scripts_need(tmp_path, cache, capsys):
    sizes = ["--train", "64", "--val", "40", "--set", "image_size=32", "--set", "batch_size=16"]
    sizes += ["--set", "epochs=1", "--set", "head_hidden=32"]
    command = ["ablate", "--a", "augment", "--b", "head_dropout", "--seeds", "2", *sizes]
    assert main([*command, "--run", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["arms"]) == ["none", "A", "B", "A+B"]
    assert all(len(recalls["i2t_R@1"]) == len(recalls["t2i_R@1"]) == 2 for recalls in found["arms"].values())
    for name in ("A", "B", "interaction"):
        assert {"estimate", "low", "high", "verdict"} <= set(found["effects"][name])
    assert {fact["what"] for fact in found["differs"]} == {"setting augment", "setting head_dropout"}
    equal = {fact["what"] for fact in found["equal"]}
    assert {"initial weights of the backbone", "steps", "order of all images", "gallery and queries"} <= equal
    assert json.loads((tmp_path / "run" / "ablation.json").read_text(encoding="utf-8")) == found
    assert main(["ablate", "--a", "seed=1", *sizes, "--run", str(tmp_path / "no")]) == 2
    assert "in another order" in capsys.readouterr().err


def test_every_ready_modification_trains(tmp_path, cache):
    "With four steps and one seed each; what the arms must share is checked by the study itself."
    names = [name for name in ablation._READY if name not in ("augment", "head_dropout")]
    changes = dict(zip("ABCDEFGHIJKLMNO", names))
    found = run_ablation(TINY, changes, tmp_path / "run", 1, one_at_a_time=True, progress=False)
    assert len(found["arms"]) == 1 + len(names)
    steps = next(fact for fact in found["equal"] if fact["what"] == "steps")
    assert steps["value"] == 4


def test_own_changes_reach_model_pictures_and_loss(tmp_path, cache):
    seen = []

    def darker(pixels, generator):
        seen.append(tuple(pixels.shape))
        return pixels // 2

    def no_loss(config, images, *more):
        return (images * 0).sum()

    def wide_head(encoder):
        encoder.head = torch.nn.Linear(encoder.head[0].in_features, 512)

    changes = {"A": Change("dark", pixels=darker), "B": Change("idle", loss=no_loss)}
    changes["C"] = Change("one layer", model=wide_head)
    found = run_ablation(TINY, changes, tmp_path / "run", 1, one_at_a_time=True, progress=False)
    assert seen and set(seen) == {(16, 32, 32, 3)}
    differs = {fact["what"]: fact["arms"] for fact in found["differs"]}
    assert len(set(differs["parameters that train"].values())) == 2
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "run" / "arms").iterdir()}
    assert files["B-seed42"]["loss"] == 0 != files["none-seed42"]["loss"]


def test_the_new_fields_do_what_they_say(tmp_path, cache):
    rates = {name: [learning_rate_at(step, 20, TINY.replace(schedule=name)) for step in (1, 11, 19)]
             for name in ("cosine", "linear", "constant")}  # fmt: skip
    assert rates["constant"] == [1e-3] * 3 and rates["linear"] == pytest.approx([1e-3, 5e-4, 1e-3 / 18])
    assert rates["cosine"][1] == pytest.approx(5e-4) and rates["cosine"][2] < rates["linear"][2]
    split = prepare_data(TINY, progress=False)[0].split
    first = [_epoch_captions(split, TINY.replace(caption_choice="first"), epoch) for epoch in (0, 1)]
    assert torch.equal(*first) and (split.caption_image[first[0][:, 0]] == np.arange(64)).all()
    assert (first[0][:, 0] % 5 == 0).all()


def test_lesson_10_has_a_paragraph_for_each_ready_change():
    lesson = json.loads((ROOT / "nbs/course/solutions/10_ablation.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in lesson["cells"] if c["cell_type"] == "markdown"]
    start = next(i for i, text in enumerate(cells) if "ready by name" in text)
    paragraphs = "\n".join(cells[start + 1 : start + 9])
    assert {name for name in ablation._READY if f"`{name}" not in paragraphs} == set()
