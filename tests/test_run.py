"The lab from the command line, end to end: results, resumption, and one sentence for bad input."

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from processes import finished
from safetensors.torch import load_file

from clip475.app.cli import main

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures(
    "one_thread"
)  # as OMP_NUM_THREADS in the processes of their own: the same bits
SMALL = ["--train", "256", "--val", "64", "--set", "epochs=3", "--set", "batch_size=32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


def environment(place):
    return os.environ | {
        "CLIP475_CACHE": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def clip475(place, *argv):
    "The command in a process of its own, as a person starts it."
    return subprocess.run(
        [sys.executable, "-m", "clip475", *map(str, argv)],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
    )


def here(place, *argv):
    "The command in this process, which need not import everything again."
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(place),
        patch.dict(os.environ, environment(place)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main([str(a) for a in argv])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def ok(place, *argv, how=here):
    done = how(place, *argv, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def same_weights(place, one, other):
    "Bit for bit (the order of the names in a safetensors file is free)."
    one, other = (load_file(place / run / "model.safetensors") for run in (one, other))
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.fixture(scope="module")
def first(place):
    return ok(place, "demo", *SMALL, "--run", "first", how=clip475)


def test_demo_leaves_a_whole_run(place, first):
    assert set(first) >= {"run", "i2t", "t2i", "images", "captions", "chance", "seconds", "ceiling"}
    assert (
        first["images"] == 64
        and first["captions"] == 320
        and first["chance"]["t2i"]["R@1"] == pytest.approx(1 / 64)
        and first["chance"]["i2t"]["R@1"] == pytest.approx(5 / 320)
    )
    assert all(0 <= first[way][f"R@{k}"] <= 1 for way in ("i2t", "t2i") for k in (1, 5, 10))
    names = {p.relative_to(place / "first").as_posix() for p in (place / "first").rglob("*") if p.is_file()}
    assert {
        "config.json",
        "metrics.csv",
        "model.safetensors",
        "report.md",
        "results.json",
        "figures/search-a-red-boat.png",
        "figures/loss.png",
    } <= names
    report = (place / "first" / "report.md").read_text()
    gallery, recall = report.index("figures/text_to_image.png"), report.index("figures/recall.png")
    assert gallery < recall < report.index("| component |") < report.index("Hardware")


def test_it_learned_something(place, first):
    rows = list(csv.DictReader(open(place / "first" / "metrics.csv")))
    assert len(rows) == 3 and float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert (
        first["i2t"]["R@10"] > 3 * first["chance"]["i2t"]["R@10"]
        and first["t2i"]["R@10"] > 2 * first["chance"]["t2i"]["R@10"]
    )


def test_the_same_seed_gives_the_same_numbers(place, first):
    second = ok(place, "train", *SMALL, "--run", "second", how=clip475)
    assert {k: second[k] for k in ("i2t", "t2i")} == {k: first[k] for k in ("i2t", "t2i")}
    assert same_weights(place, "first", "second")


# the signal comes from the process itself after its first checkpoint: on time, however busy the machine is
ASKED = """
import os, signal, sys
import clip475.training.runs as runs
from clip475.app.cli import main

save = runs._save_checkpoint

def save_and_ask(*args):
    runs._save_checkpoint = save
    save(*args)
    os.kill(os.getpid(), signal.SIGTERM)

runs._save_checkpoint = save_and_ask
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_run_that_is_asked_to_stop_resumes_to_the_same_bits(place, first):
    "SIGTERM, as a cluster sends it; SIGKILL is in test_kill.py."
    command = [sys.executable, "-c", ASKED, "train", *SMALL, "--run", "asked"]
    done = finished(command, 130, cwd=place, env=environment(place))
    out, err = done.stdout, done.stderr
    assert out == "" and "Traceback" not in err
    assert "stopped after step" in err and "--resume --run" in err and "asked" in err
    assert int(next((place / "asked" / "checkpoint").glob("step-*.pt")).stem[5:]) < 24  # it had not finished
    resumed = ok(place, "train", "--resume", "--run", "asked")
    assert resumed["i2t"] == first["i2t"] and resumed["t2i"] == first["t2i"]
    assert same_weights(place, "first", "asked")


def test_eval_and_search_use_what_was_trained(place, first):
    again = ok(place, "eval", "--run", "first")
    assert again["i2t"] == first["i2t"] and again["t2i"] == first["t2i"]
    found = ok(place, "search", "two white dogs in the snow", "--run", "first", "-k", "3")
    assert len(found["results"]) == 3 and Path(place / found["figure"]).is_file()
    assert all(Path(f["file"]).is_file() and len(f["captions"]) == 5 for f in found["results"])


def test_a_picture_asks_with_words_added(place, first):
    mine = sorted((next((place / "cache").glob("scenes-v*-256+64-*-seed42")) / "val2014").iterdir())[5]
    found = ok(place, "search", "--image", mine, "--run", "first", "-k", "2")
    assert found["results"][0]["file"] == str(mine) and found["results"][0]["score"] > 0.99
    said = ok(place, "search", "--image", mine, "--captions", "--run", "first", "-k", "3")["results"]
    assert len(said) == 3 and all(isinstance(f["caption"], str) for f in said)
    moved = ok(
        place, "search", "--image", mine, "--plus", "in the snow", "--minus", "at night", "--run", "first"
    )
    assert moved["results"] != found["results"] and "+in the snow" in moved["query"]
    assert "never seen" in ok(place, "search", "a xylophone and a red boat", "--run", "first")["note"]


def test_progress_goes_to_stderr_and_the_result_to_stdout(place, first):
    done = here(place, "eval", "--run", "first")
    assert done.returncode == 0 and "image→text" in done.stdout and "batch" not in done.stdout


def test_prepare_names_its_folders_and_leaves_the_images_alone(place, first):
    made = ok(place, "prepare", "--train", "256", "--val", "64")
    root = Path(made["data"])
    assert (
        root.is_relative_to(place / "cache")
        and made["train"]["images"] == 256
        and Path(made["cache"]) == place / "cache"
    )
    shutil.copytree(root, place / "mine")
    before = sorted(p.relative_to(place / "mine") for p in (place / "mine").rglob("*"))
    ok(place, "prepare", "--data", "mine")
    assert sorted(p.relative_to(place / "mine") for p in (place / "mine").rglob("*")) == before


def test_prepare_fetches_a_data_set_into_its_folder_and_fills_the_caches(place, first):
    "The fetching itself is in test_download.py; here, what the verb makes of it."
    asked = []

    def fetch(root, config, **kwargs):
        asked.append((Path(root), config))
        shutil.copytree(next((place / "cache").glob("scenes-v*-256+64-*-seed42")), root)
        return {"fingerprint": "f" * 16, "bad": []}

    with patch("clip475.data.download.prepare_coco2014", fetch):
        made = ok(
            place,
            "prepare",
            "--dataset",
            "coco2014",
            "--root",
            "coco",
            "--preset",
            "tiny",
            "--train",
            "200",
            "--val",
            "50",
            "--on-bad",
            "replace",
        )
    ((root, config),) = asked
    assert root == place / "coco" == Path(made["data"]) and (
        config.train_images,
        config.val_images,
        config.on_bad,
    ) == (200, 50, "replace")
    assert (
        made["train"]["images"] == 200
        and made["val"]["images"] == 50
        and made["fetched"] == {"fingerprint": "f" * 16, "replaced": 0}
    )


# ── bad input: one sentence, exit code 2, nothing left behind ──


def refused(place, *argv):
    before = {p for p in place.rglob("*") if "cache" not in p.parts}
    done = here(place, *argv)
    assert done.returncode == 2 and done.stdout == "", (done.stdout, done.stderr)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("clip475: ")]
    assert len(sentences) == 1 and "Traceback" not in done.stderr, done.stderr
    return sentences[0], {p for p in place.rglob("*") if "cache" not in p.parts} - before


def damaged(place, name, change):
    "A copy of the prepared scenes with one thing changed."
    root = place / name
    shutil.copytree(next((place / "cache").glob("scenes-v*-256+64-*-seed42")), root)
    file = root / "annotations" / "captions_train2014.json"
    if change is not None:
        file.write_text(change(json.loads(file.read_text())))
    return root


def entry(part, **fields):
    def change(data):
        data[part].append(fields)
        return json.dumps(data)

    return change


def test_bad_caption_files(place, first):
    cases = {
        "nojson": (lambda d: "{", "not JSON"),
        "nofield": (lambda d: json.dumps({"images": d["images"]}), "annotations"),
        "stranger": (entry("annotations", id=9_999_999, image_id=42_000_000, caption="x"), "42000000"),
        "silent": (
            lambda d: json.dumps(d | {"annotations": [a for a in d["annotations"] if a["image_id"] != 7]}),
            "image 7",
        ),
    }
    for name, (change, says) in cases.items():
        message, left = refused(
            place, "train", "--data", damaged(place, name, change), "--run", f"run-{name}"
        )
        assert says in message and "captions_train2014.json" in message, message
        assert not (place / f"run-{name}").exists()


def test_an_image_that_does_not_decode(place, first):
    root = damaged(place, "broken", None)
    broken = root / "train2014" / "COCO_train2014_000000000009.jpg"
    broken.write_bytes(b"<html>404</html>")
    message, left = refused(place, "train", "--data", root, "--run", "run-broken")
    assert broken.name in message and not (place / "run-broken").exists()


def test_an_empty_split_and_too_many_images(place, first):
    root = damaged(place, "empty", None)
    for p in (root / "val2014").iterdir():
        p.unlink()
    assert "val2014" in refused(place, "train", "--data", root)[0]
    message, _ = refused(
        place,
        "train",
        "--data",
        next((place / "cache").glob("scenes-v*-256+64-*-seed42")),
        "--train",
        "999999",
    )
    assert "999999" in message and "256" in message


@pytest.mark.parametrize(
    "argv, says",
    [
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--run", "first"], "--resume"),
        (["train", "--resume", "--run", "never"], "never"),
        (["train", "--resume", "--run", "first", "--seed", "7"], "seed"),
        (["train", "--resume", "--run", "first", "--preset", "coco"], "--preset"),
        (["train", "--run", "first/config.json"], "a file"),
        (["train", "--run", "first/config.json/deeper"], "nothing can be written"),
        (["train", "--set", "preset=coco"], "--preset coco"),
        (["train", "--seed", str(2**64)], "seed"),
        (["train", "--val", "1"], "val_images"),
        (["train", "--set", "embedding_dim=256"], "embedding_dim"),
        (["train", "--set", "backbone_weights=none.pth"], "none.pth"),
        (["train", "--set", "loss=multi-positive", "--set", "label_smoothing=2"], "label_smoothing"),
        (["prepare", "--root", "x"], "--dataset"),
        (["eval", "--run", "never"], "never"),
        (["search", "a dog", "--run", "first", "-k", "65"], "65"),
        (["search", " ", "--run", "first"], "empty"),
        (["search", "--run", "first"], "empty"),
        (["search", "a", "--image", "x.jpg", "--run", "first"], "give one of them"),
        (["search", "a", "--plus", "b", "--run", "first"], "--image"),
        (["search", "--image", "first/report.md", "--run", "first"], "report.md"),
        (["train", "--set", "speed=9"], "speed"),
        (["train", "--set", "epochs=none"], "epochs"),
        (["train", "--set", "nothing"], "FIELD=VALUE"),
        (["train", "--config", "none.json"], "none.json"),
        (["train", "--set", "text_model=someone/clip"], "revision"),
        (["train", "--set", "backbone=vgg"], "resnet18"),
        (["train", "--set", "batch_size=1000", "--train", "256", "--val", "64"], "batch_size"),
        (["course"], "DIR"),
        (["course", "first/config.json"], "first/config.json"),
        (["fly"], "demo"),
        ([], "VERB"),
    ],
)
def test_mistakes_on_the_command_line(place, first, argv, says):
    message, left = refused(place, *argv)
    assert says in message, message
    assert not left, left


def test_a_model_of_another_config_or_a_cut_file_is_refused(place, first):
    shutil.copytree(place / "first", place / "cut")
    weights = place / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "model.safetensors" in refused(place, "search", "a dog", "--run", "cut")[0]


def test_a_tiny_gallery_is_enough_for_the_demo(place, first):
    results = ok(
        place,
        "demo",
        *SMALL[:2],
        "--val",
        "3",
        "--set",
        "epochs=1",
        "--set",
        "batch_size=32",
        "--run",
        "three",
    )
    assert len(results["search"]["results"]) == 3


def test_data_that_moved_are_named_and_pictures_that_changed_are_refused(place, first):
    shutil.copytree(place / "first", place / "moved")
    data = damaged(place, "elsewhere", None)
    before = ok(place, "search", "a red boat", "--run", "moved", "--data", data)["results"]
    best = data / "val2014" / Path(before[0]["file"]).name
    assert Path(before[0]["file"]) == best
    others = [p for p in best.parent.iterdir() if p.name not in {Path(f["file"]).name for f in before}]
    best.write_bytes(others[0].read_bytes())
    message, _ = refused(place, "search", "a red boat", "--run", "moved", "--data", data)
    assert str(best) in message and "1 of 64" in message


def test_the_report_keeps_what_it_knows_of_the_training(place, first):
    told = first["training"]
    again = ok(place, "eval", "--run", "first")
    assert again["training"] == told and again["seconds"] != first["seconds"]
    assert (
        f"{told['seconds']} s, validation included, in 1 process"
        in (place / "first" / "report.md").read_text()
    )


def test_a_third_split_that_chose_nothing(place, first):
    results = ok(
        place,
        "train",
        "--train",
        "64",
        "--val",
        "32",
        "--test",
        "16",
        "--set",
        "epochs=1",
        "--set",
        "batch_size=32",
        "--run",
        "third",
        "--data",
        next((place / "cache").glob("scenes-v*-256+64-*-seed42")),
    )
    ids = {
        name: s["ids"]
        for name, s in json.loads((place / "third" / "split.json").read_text())["splits"].items()
    }
    assert results["test"]["images"] == 16 and {k: len(v) for k, v in ids.items()} == {
        "train": 64,
        "val": 32,
        "test": 16,
    }
    assert (
        len(set(sum(ids.values(), []))) == 112
        and "chose nothing" in (place / "third" / "report.md").read_text()
    )


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file as POSIX does")
def test_a_full_disk_is_one_sentence_and_loses_nothing(place, first):
    "Files end at 30 MB here; a checkpoint takes 60."

    def limited():
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30 * 2**20, 30 * 2**20))

    command = [sys.executable, "-m", "clip475", "train", *SMALL, "--run", "full"]
    done = finished(command, 2, cwd=place, env=environment(place), preexec_fn=limited)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith(
        "clip475: full/checkpoint/step-00000008.pt: the checkpoint cannot be written (File too large); "
    ), done.stderr[-500:]
    assert {p.name for p in (place / "full").rglob("*") if p.is_file()} == {
        "config.json",
        "split.json",
        ".lock",
    }


def test_help_reads_well(place):
    done = clip475(place, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and all(
        verb in done.stdout
        for verb in (*"demo prepare train eval search frozen params course".split(), "examples")
    )
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_course_writes_the_lessons_and_keeps_what_a_student_changed(place):
    made = ok(place, "course", "lessons")
    assert made["written"] and not made["kept"]
    lesson = place / "lessons" / made["written"][0]
    lesson.write_text("{}")
    again = ok(place, "course", "lessons")
    assert again["written"] == [] and again["kept"] == [lesson.name] and lesson.read_text() == "{}"
