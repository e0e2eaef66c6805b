"""A run that is killed with SIGKILL again and again, in the middle of writing too, ends with the bits of the
run that was never killed."""

import json
import os
import sys
from pathlib import Path

import pytest
from processes import finished

ROOT = Path(__file__).resolve().parents[1]

# One process imports everything once and forks a child for each attempt:
# ten starts of Python would take minutes.
SCRIPT = """
import io, json, os, random, signal, sys, threading, traceback
from pathlib import Path
import torch
from safetensors.torch import load_file
from clip475.core.config import LabConfig
from clip475.app.report import _recall_columns
from clip475.training.checkpoints import _checkpoint_files
from clip475.training.runs import fit
from clip475.training.batches import prepare_data
import pandas as pd

place, rng, kills = Path(sys.argv[1]), random.Random(int(sys.argv[2])), int(sys.argv[3])
torch.set_num_threads(1)
config = LabConfig.from_preset(
    "tiny",
    train_images=128,
    val_images=32,
    epochs=8,
    batch_size=16,
    image_size=32,
    ema_decay=0.9,
    augment="crop+jitter",
    checkpoint_steps=1,
)
train, val = prepare_data(config, progress=False)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(target, moment, share):
    "Arrange for the death of this process at a moment of the checkpoint of step `target`, or soon after it."
    save = torch.save

    def save_and_die(content, file):
        if content["step"] < target:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        size = len(whole.getvalue())
        written = {"while writing": int(share * size), "before it has its name": size}.get(moment)
        file.write(whole.getvalue()[:written])
        file.flush()
        if written is not None:
            die()
        threading.Timer(share / 20, die).start()

    torch.save = save_and_die


def child(run, resume, fields, *death):
    "A process that trains, and kills itself if there is a `death`: on time, however busy the machine is."
    pid = os.fork()
    if pid:
        return pid
    try:
        if death:
            die_at(*death)
        fit(
            config.replace(**fields),
            train,
            val,
            run,
            resume=resume,
            measure=_recall_columns,
            progress=False,
        )
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


whole, killed = place / "whole", place / "killed"
assert wait(child(whole, False, {"checkpoint_steps": None})) == 0


def newest():
    return max([int(f.stem[5:]) for f in _checkpoint_files(killed)], default=-1)


MOMENTS = ("while writing", "soon after", "before it has its name", "soon after")
count = writing = 0
steps_at_kill = []
while True:
    death = (newest() + rng.randrange(2, 4), MOMENTS[count % 4], rng.random()) if count < kills else ()
    code = wait(child(killed, (killed / "config.json").exists() and newest() >= 0, {}, *death))
    if code != -signal.SIGKILL:
        break
    count, writing = count + 1, writing + bool(list((killed / "checkpoint").glob(".part-*")))
    steps_at_kill.append(newest())

a, b = (load_file(p / "model.safetensors") for p in (whole, killed))
x, y = (
    pd.read_csv(p / "metrics.csv").drop(columns=["images_per_second", "train_seconds", "val_seconds"])
    for p in (whole, killed)
)
s, t = (torch.load(_checkpoint_files(p)[0], weights_only=True) for p in (whole, killed))


def equal(m, n):
    return m.keys() == n.keys() and all(torch.equal(v, n[k]) for k, v in m.items())


print(
    json.dumps(
        {
            "kills": count,
            "while writing": writing,
            "exit": code,
            "at": steps_at_kill,
            "best model": equal(a, b),
            "metrics": x.equals(y),
            "steps": pd.read_csv(whole / "steps.csv").equals(pd.read_csv(killed / "steps.csv")),
            "last model": equal(s["model"], t["model"]),
            "average": equal(s["average"], t["average"]),
            "optimizer": s["optimizer"]["param_groups"] == t["optimizer"]["param_groups"]
            and all(equal(v, t["optimizer"]["state"][i]) for i, v in s["optimizer"]["state"].items()),
            "left over": len(list(killed.rglob(".part-*"))),
            "checkpoints": len(_checkpoint_files(killed)),
        }
    )
)
"""


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
def test_killed_at_ten_moments(tmp_path):
    (tmp_path / "kill.py").write_text(SCRIPT)
    environment = os.environ | {
        "CLIP475_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = finished([sys.executable, str(tmp_path / "kill.py"), str(tmp_path), "475", "10"], env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exit"] == 0, (found, done.stderr[-2000:])
    assert found["kills"] >= 6 and found["while writing"] >= 2, found
    assert len(set(found["at"])) >= 5, found  # at many different steps
    for what in ("best model", "last model", "average", "optimizer", "metrics", "steps"):
        assert found[what], (what, found)
    assert found["left over"] == 0 and found["checkpoints"] == 2, found
