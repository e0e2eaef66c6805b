"The freezing study: equal starts, frozen parts that keep every bit, a killed experiment that goes on."

import json
import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from processes import finished

import clip475.studies.freezing as experiments
from clip475.core.files import LabError, error_message, save_tensors
from clip475.data.scenes import _VAL_START, caption_scene
from clip475.models.freezing import changed_tensors, snapshot
from clip475.studies.arms import (
    ARMS,
    _all_batches,
    _frozen_names,
    _Log,
    _optimizer_groups,
    _start_run,
    _train,
)
from clip475.studies.claims import _difference, _grid_table, verdicts
from clip475.studies.freezing import _check_alike, _planned_runs, frozen_experiment
from clip475.studies.held_out import (
    _NOVELTIES,
    _SCALES,
    _arm_config,
    _collect_scenes,
    _make_data,
    _novelty,
    _pretrain_backbone,
    _Scale,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NANO = _Scale(48, 12, 8, 32, 12, 1, 2, (1, 2), 2)
SOME = ["spec", "all", "head-only", "random text, frozen", "no L2", "spec, no cache", "none"]


@pytest.fixture(scope="module")
def data():
    return _make_data(NANO)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.set_num_threads(1)
    file = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_tensors(file, _pretrain_backbone(NANO, _arm_config(NANO, 7))[0])
    return file


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    "Most arms with two seeds, as small as it gets."
    torch.set_num_threads(1)
    return frozen_experiment(tmp_path_factory.mktemp("runs") / "all", NANO, progress=False, arms=SOME)


def test_training_shows_and_says_nothing_that_is_held_out(data):
    text = " ".join(data.train.split.captions).lower().split()
    assert not {"purple", "elephant", "elephants", "above", "below", "over", "beneath", "higher"} & set(
        text
    )  # "under" the stars is a place


def test_gallery_scenes_are_new_in_one_way_each():
    found = _collect_scenes(42, _VAL_START, {name: 5 for name in _NOVELTIES})
    for name, scenes in found.items():
        assert len(scenes) == 5 and all(_novelty(s) == (set() if name == "seen" else {name}) for s in scenes)
        for s in scenes:
            assert all(
                _novelty(c) <= _novelty(s) for c in caption_scene(s)
            )  # a caption never says more than its picture shows


def test_questions_differ_in_one_word(data):
    for group, some in data.questions.items():
        for row, options in some:
            assert data.group[row] == group and len(set(options)) == len(options) >= 2
            first = options[0].rstrip(".").split()
            for other in options[1:]:
                words = other.rstrip(".").split()
                assert group == "relation" or (
                    len(words) == len(first) and sum(a != b for a, b in zip(words, first)) <= 2
                )


def test_arms_of_a_seed_begin_alike_and_seeds_differ(data, backbone):
    planned = [(name, 1) for name in ARMS] + [("spec", 2), ("random text, frozen", 2)]
    starts = {
        (name, seed): _start_run(ARMS[name], data, _arm_config(NANO, seed, backbone)).start
        for name, seed in planned
    }
    marks = {key: (start["image"], start["text"]) for key, start in starts.items()}
    pretrained = {name for name, arm in ARMS.items() if arm.image == "pretrained"}
    assert len({image for (name, seed), (image, _) in marks.items() if seed == 1 and name in pretrained}) == 1
    assert marks["random image", 1][0] != marks["spec", 1][0]
    assert marks["spec", 1][0] != marks["spec", 2][0]
    for kind in ("pretrained", "random"):
        assert (
            len({text for (name, seed), (_, text) in marks.items() if ARMS[name].text == kind and seed == 1})
            == 1
        )
    assert marks["random text, frozen", 1][1] != marks["random text, frozen", 2][1]


def test_all_arms_begin_with_the_common_backbone(data, backbone):
    from safetensors.torch import load_file

    model = _start_run(ARMS["all"], data, _arm_config(NANO, 1, backbone)).model
    assert all(
        torch.equal(model.image_encoder.backbone.state_dict()[k], v) for k, v in load_file(backbone).items()
    )


def test_order_follows_from_the_seed_alone(data, backbone):
    orders = [
        torch.cat([captions for _, captions, _ in _all_batches(data, _arm_config(NANO, seed, backbone))])
        for seed in (1, 1, 2)
    ]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize(
    "name",
    [
        "spec",
        "head-only",
        "last-block",
        "locked-image",
        "norms-only",
        "text-projection",
        "random text, frozen",
        "no L2",
        "spec, no cache",
    ],
)
def test_what_is_frozen_keeps_every_bit_and_the_rest_moves(data, backbone, name):
    config, arm = _arm_config(NANO, 1, backbone), ARMS[name]
    run = _start_run(arm, data, config)
    model = run.model
    still, before = _frozen_names(model), snapshot(model)
    _train(run, _Log())
    moved = set(changed_tensors(before, snapshot(model)))
    assert not moved & still
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained - moved <= {
        n for n in trained if "text" in n or "position" in n
    }  # rows and positions that no caption used may rest
    assert (name != "head-only") or any("running_mean" in n for n in still)


def test_slower_text_learns_at_its_own_rate(data, backbone):
    run = _start_run(replace(ARMS["all"], text_rate=0.1), data, _arm_config(NANO, 1, backbone))
    model = run.model
    text = {id(p) for p in model.text_encoder.parameters()}
    groups = _optimizer_groups(run)
    assert all(group["rate"] == (0.1 if id(p) in text else 1) for group in groups for p in group["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_the_experiment_is_complete_and_fair(experiment):
    assert len(experiment["results"]) == len(_planned_runs(NANO, SOME)) == 2 * len(SOME) - 1
    assert len(_planned_runs(NANO)) == 2 * len(ARMS) - 1
    assert not any(r["frozen_moved"] for r in experiment["results"])
    trained = [r for r in experiment["results"] if r["steps"]]
    assert {r["steps"] for r in trained} == {4} and all(
        len({r["order"] for r in trained if r["seed"] == s}) == 1 for s in (1, 2)
    )
    json.dumps(experiment, allow_nan=False)


def test_cached_text_only_changes_the_time(experiment):
    one, two = (
        next(r for r in experiment["results"] if r["arm"] == arm and r["seed"] == 1)
        for arm in ("spec", "spec, no cache")
    )
    np.testing.assert_allclose(one["blocks"]["loss"], two["blocks"]["loss"], rtol=0.03)


def test_drift_is_zero_where_the_text_is_frozen_and_only_there(experiment):
    for r in experiment["results"]:
        trains = ARMS[r["arm"]].policy in ("all", "locked-image", "text-projection")
        assert (
            (r["drift"]["weights"]["text encoder"] > 0) == (r["drift"]["seen"]["mean_change"] > 0) == trains
        ), r["arm"]
        assert trains or all(p.get("movement", 0) == 0 for p in r["points"])


def test_table_has_a_row_per_arm_and_its_numbers(experiment):
    table = _grid_table(experiment)
    assert list(table.index) == SOME
    assert table.loc["none", "trains (k)"] == 0 and table.loc["none", "images/s"] == ""
    assert (
        table.loc["head-only", "trains (k)"]
        < table.loc["spec", "trains (k)"]
        < table.loc["all", "trains (k)"]
    )
    assert table.loc["spec", "memory (MB)"] < table.loc["all", "memory (MB)"]
    assert table.loc["spec", "similarities moved"] == "0.00" and list(table["seeds"]) == [
        1 if name == "spec, no cache" else 2 for name in SOME
    ]


def test_every_claim_gets_a_verdict(experiment):
    found = verdicts(experiment)
    assert (
        isinstance(found, pd.DataFrame)
        and len(found) == 9
        and found.map(bool).drop(columns="seeds").all(axis=None)
    )
    assert found.verdict.eq("not decided").all()  # two seeds decide nothing


def test_only_the_last_text_layer_trains_where_the_arm_says_so(data, backbone):
    run = _start_run(ARMS["last text layer"], data, _arm_config(NANO, 1, backbone))
    trained = {name for name, p in run.model.text_encoder.named_parameters() if p.requires_grad}
    assert trained and all(".layers.2." in name or "text_projection" in name for name in trained)
    before = snapshot(run.model)
    _train(run, _Log())
    moved = set(changed_tensors(before, snapshot(run.model)))
    assert not moved & _frozen_names(run.model) and any("layers.2" in name for name in moved)


def test_each_arm_chooses_its_learning_rate_on_scenes_of_its_own(tmp_path):
    scale = replace(NANO, seeds=(1,), rates=(1e-3, 3e-3), tune=10)
    found = frozen_experiment(tmp_path / "run", scale, progress=False, arms=["head-only", "locked-image"])
    trials = {t["arm"]: t["trials"] for t in found["tuning"]}
    assert (
        len(trials["head-only"]) == 2 and len(trials["locked-image"]) == 4
    )  # the text has a rate of its own
    for r in found["results"]:
        best = max(t["score"] for t in trials[r["arm"]])
        assert best in [
            t["score"] for t in trials[r["arm"]] if (t["rate"], t["text_rate"]) == (r["rate"], r["text_rate"])
        ]
    data = _make_data(scale)
    pixels, split = data.tuning
    others = {text for text in [*data.train.split.captions, *data.split.captions] if len(text) > 40}
    assert len(pixels) == 10 and not others & set(split.captions)


def test_results_of_other_data_are_not_mixed_in(tmp_path):
    frozen_experiment(tmp_path / "run", NANO, progress=False, arms=["none"])
    file = tmp_path / "run" / "arms" / "none-seed1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "other"}))
    with pytest.raises(LabError, match="measured on other data"):
        frozen_experiment(tmp_path / "run", NANO, True, progress=False, arms=["none"])


def test_resume_reads_finished_arms_back(tmp_path, monkeypatch):
    arms = ["none"]
    first = frozen_experiment(tmp_path / "run", NANO, progress=False, arms=arms)
    (tmp_path / "run" / "arms" / "none-seed2.json").unlink()
    ran, real = [], experiments._run_arm
    monkeypatch.setattr(
        experiments,
        "_run_arm",
        lambda arm, data, config: ran.append((arm.name, config.seed)) or real(arm, data, config),
    )
    again = frozen_experiment(tmp_path / "run", NANO, resume=True, progress=False, arms=arms)
    assert ran == [("none", 2)] and again["results"] == first["results"]


def test_another_scale_or_a_used_folder_is_refused(tmp_path):
    frozen_experiment(tmp_path / "run", NANO, progress=False, arms=["none"])
    error_message(
        "holds an experiment already",
        frozen_experiment,
        tmp_path / "run",
        NANO,
        progress=False,
        arms=["none"],
    )
    error_message(
        "another scale",
        frozen_experiment,
        tmp_path / "run",
        _SCALES["micro"],
        resume=True,
        progress=False,
        arms=["none"],
    )
    error_message("scale 'huge' is not known", frozen_experiment, tmp_path / "new", "huge")
    error_message("arm 'half' is not known", frozen_experiment, tmp_path / "new", NANO, arms=["half"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"order": "x"}, "order of the data"),
        ({"steps": 5}, "number of steps"),
        ({"start": {"image": "x", "text": "x"}}, "initial"),
        ({"frozen_moved": ["text_encoder.w"]}, "has moved"),
    ],
)
def test_unfair_arms_do_not_stand_in_one_table(experiment, change, words):
    broken = [r | change if (r["arm"], r["seed"]) == ("all", 1) else r for r in experiment["results"]]
    with pytest.raises(LabError, match=words):
        _check_alike(broken)


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_killed_grid_loses_one_arm_at_most(tmp_path):
    folder = tmp_path / "run"
    code = f"""
import os, signal, torch
import clip475.studies.freezing as freezing
from clip475.studies.held_out import _Scale

def die_in_the_third(*args, left=[2]):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return run_arm(*args)

run_arm, freezing._run_arm = freezing._run_arm, die_in_the_third
torch.set_num_threads(1)
scale = _Scale(48, 12, 8, 32, 12, 1, 2, (1, 2, 3, 4), 2)
freezing.frozen_experiment({str(folder)!r}, scale, progress=False, arms=["none"])
"""
    finished([sys.executable, "-c", code], -signal.SIGKILL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    arms = tmp_path / "run" / "arms"
    kept = {f: f.read_bytes() for f in arms.glob("[!.]*.json")}
    assert len(kept) == 2 and all(json.loads(b) for b in kept.values())
    scale = _Scale(48, 12, 8, 32, 12, 1, 2, (1, 2, 3, 4), 2)
    whole = frozen_experiment(tmp_path / "run", scale, resume=True, progress=False, arms=["none"])
    assert (
        len(whole["results"]) == 4
        and all(f.read_bytes() == b for f, b in kept.items())
        and not list(arms.glob(".part*"))
    )


def test_differences_are_taken_seed_by_seed():
    fake = {
        "results": [
            {"arm": a, "seed": s, "v": v} for a, s, v in (("a", 1, 3), ("a", 2, 5), ("b", 1, 1), ("b", 2, 3))
        ]
    }
    assert _difference(fake, "a", "b", lambda r: r["v"]) == (2, 2, 2)
