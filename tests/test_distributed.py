"""One batch over several processes: the loss and gradients of one, the same run, another number on resuming,
and no hang when one dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from processes import check_code, finished
from safetensors.torch import load_file
from test_stream import members_of, write_shard
from torch.distributed import TCPStore

from clip475.core.config import LabConfig
from clip475.data.captions import load_split
from clip475.data.images import batches, epoch_order
from clip475.data.scenes import write_scenes
from clip475.training.batches import prepare_data
from clip475.training.runs import fit

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--train",
    "96",
    "--val",
    "16",
    "--set",
    "epochs=2",
    "--set",
    "batch_size=16",
    "--set",
    "image_size=32",
    "--set",
    "precision=fp32",
    "--set",
    "freeze_batchnorm=true",
    "--set",
    "learning_rate=0.0003",
]


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
        "TQDM_DISABLE": "1",
    }


def torchrun(place, count, *argv):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={count}",
        *map(str, argv),
    ]


def run(place, *command, code=0):
    return finished(command, code, cwd=place, env=environment(place))


# the lab's own model, frozen statistics: a batch over N processes against the same batch in one,
# plain and with gradient caching
EQUAL = """
import json, torch
from pathlib import Path
from clip475.core.config import LabConfig
from clip475.data import shards
from clip475.training.distributed import ProcessGroup, _main_process_first, join_processes
from clip475.training.batches import epoch_batches, prepare_data
from clip475.training.runs import fit
from clip475.training.steps import start_training, train_step, _set_training_mode

torch.set_num_threads(1)
base = LabConfig.from_preset(
    "tiny",
    train_images=64,
    val_images=16,
    epochs=1,
    batch_size=32,
    image_size=32,
    precision="fp32",
    freeze_batchnorm=True,
)


def first_step(config, process_group):
    state = start_training(config, process_group)
    state.optimizer.step = lambda *a, **k: None  # keep the gradients, leave the weights
    _set_training_mode(state.model, config)
    pixels, texts, rows, text_rows = next(iter(epoch_batches(train, config, 0, process_group)))
    numbers = train_step(state, pixels, texts, rows, 1e-3, config, text_rows)
    return numbers.tolist(), {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None}


read, seen = shards._read_from_shard, []


def noted(split, row, place):
    seen.append([split.name, row])
    return read(split, row, place)


shards._read_from_shard = noted


def train_whole_run(process_group, name):
    "From shards or from packed pictures; each process writes down what it reads out of shards meanwhile."
    config = LabConfig.load("shards.json").replace(stream=name == "streamed")
    with _main_process_first(process_group):
        splits = prepare_data(config, progress=False)
    seen.clear()
    fit(config, *splits, name, progress=False, process_group=process_group)
    Path(f"{name}-{process_group.rank}.json").write_text(json.dumps(seen))


found = {}
with join_processes() as process_group:
    for name in ("streamed", "packed"):
        train_whole_run(process_group, name)
    with _main_process_first(process_group):
        train, val = prepare_data(base, progress=False)
    for name, fields in {
        "plain": {},
        "micro_batch": {"micro_batch": 3},
        "siglip": {"loss": "siglip"},
        "captions": {"loss": "multi-positive", "captions_per_image": 2},
        "clipped": {"clip_grad_norm": 0.5},
    }.items():
        config = base.replace(**fields)
        numbers, grads = first_step(config, process_group)
        if process_group.is_main:
            alone, expected = first_step(
                config.replace(micro_batch=None), ProcessGroup(device=torch.device("cpu"))
            )
            largest = max(g.abs().max().item() for g in expected.values())
            found[name] = {
                "same parameters": grads.keys() == expected.keys(),
                "loss": abs(numbers[0] - alone[0]),
                "norm": abs(numbers[1] - alone[1]) / alone[1],
                "gradient": max((grads[n] - g).abs().max().item() for n, g in expected.items()) / largest,
                "scalars": sorted(n for n in grads if n.startswith("logit")),
            }
if process_group.is_main:
    Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def shards(place):
    "The settings of a run from four tar shards, beside the shards."
    write_scenes(place / "scenes", train=40, val=2, seed=42, size=64, progress=False)
    split, folder = load_split(place / "scenes", "train"), place / "shards"
    folder.mkdir()
    for start in range(0, 40, 10):
        write_shard(folder / f"{start:05}.tar", members_of(split, range(start, start + 10)))
    sizes = dict(train_images=30, val_images=8, image_size=32, batch_size=8, epochs=2)
    fixed = dict(precision="fp32", freeze_batchnorm=True, learning_rate=0.0003)
    config = LabConfig.from_preset("tiny", data=str(folder), **sizes, **fixed)
    config.save(place / "shards.json")
    return config


@pytest.fixture(scope="module")
def four(place, shards):
    "What four processes leave in `place`, started once for the tests below."
    (place / "equal.py").write_text(EQUAL)
    run(place, *torchrun(place, 4, "equal.py"))


def test_loss_and_gradients_are_those_of_one_process(place, four):
    found = json.loads((place / "found.json").read_text())
    assert set(found) == {"plain", "micro_batch", "siglip", "captions", "clipped"}
    for name, f in found.items():
        assert f["same parameters"] and f["loss"] < 1e-4 and f["norm"] < 1e-4 and f["gradient"] < 1e-4, (
            name,
            f,
        )
        assert f["scalars"] == (["logit_bias", "logit_scale"] if name == "siglip" else ["logit_scale"]), (
            name,
            f,
        )


def losses(place, name):
    return pd.read_csv(place / name / "steps.csv").loss.to_numpy()


def test_streaming_changes_no_bit_and_each_process_reads_its_share(
    place, four, shards, one_thread, monkeypatch
):
    one, other = (load_file(place / name / "model.safetensors") for name in ("streamed", "packed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    orders = [batches(epoch_order(30, shards.seed, epoch), 8) for epoch in (0, 1)]
    for rank in range(4):
        own = torch.cat([rows[2 * rank : 2 * rank + 2] for order in orders for rows in order])
        read = json.loads((place / f"streamed-{rank}.json").read_text())
        assert read == [["train", row] for row in own.tolist()] and len(read) == 12
        assert json.loads((place / f"packed-{rank}.json").read_text()) == []
    monkeypatch.setenv("CLIP475_CACHE", str(place / "cache"))
    fit(shards, *prepare_data(shards, progress=False), place / "by_one", progress=False)
    streamed, by_one = losses(place, "streamed"), losses(place, "by_one")
    assert (streamed == losses(place, "packed")).all() and len(streamed) == 6
    assert abs(streamed - by_one).max() < 1e-2  # rounding, as without streaming


@pytest.fixture(scope="module")
def alone(place):
    run(place, sys.executable, "-m", "clip475", "train", *SMALL, "--run", "alone", "--json")
    return losses(place, "alone")


def test_a_run_over_two_processes_is_the_run_of_one(place, alone):
    done = run(place, *torchrun(place, 2, "-m", "clip475", "train", *SMALL, "--run-folder", "two", "--json"))
    results = json.loads(done.stdout)  # one object, from the first process alone
    assert results["training"]["processes"] == 2 and len(alone) == 12
    assert abs(losses(place, "two") - alone).max() < 1e-2  # rounding grows over twelve steps of AdamW
    assert (place / "two" / "report.md").is_file()


def test_resuming_with_another_number_of_processes(place, alone):
    script = """
import sys, torch
from clip475.core.config import LabConfig
from clip475.training.distributed import join_processes
from clip475.training.runs import fit
from clip475.training.batches import prepare_data

config = LabConfig.load("alone/config.json")


def stop_after_one(state):
    raise SystemExit


with join_processes() as process_group:
    fit(
        config,
        *prepare_data(config, progress=False),
        "half",
        progress=False,
        process_group=process_group,
        watch=stop_after_one,
    )
"""
    (place / "half.py").write_text(script)
    run(place, sys.executable, "half.py")
    assert len(pd.read_csv(place / "half" / "metrics.csv")) == 1
    run(place, *torchrun(place, 2, "-m", "clip475", "train", "--resume", "--run-folder", "half"))
    mine = losses(place, "half")
    assert len(mine) == 12 and (mine[:6] == alone[:6]).all() and abs(mine - alone).max() < 1e-2
    assert (
        load_file(place / "half" / "model.safetensors").keys()
        == load_file(place / "alone" / "model.safetensors").keys()
    )


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_one_process_dies_and_the_run_ends_with_a_word(place, alone):
    "By itself: without torchrun's watchdog, the survivor must find out and say so."
    script = """
import os, signal, sys, torch
from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.training.distributed import join_processes
from clip475.training.runs import fit
from clip475.training.batches import prepare_data
import clip475.training.runs as runs

torch.set_num_threads(1)
config = LabConfig.from_preset(
    "tiny", train_images=64, val_images=16, epochs=50, batch_size=16, image_size=32
)
try:
    with join_processes(minutes=30) as process_group:
        real = runs.train_epoch

        def train_epoch(state, *args):
            if state.epoch == 1 and process_group.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(state, *args)

        runs.train_epoch = train_epoch
        fit(
            config,
            *prepare_data(config, progress=False),
            "dying",
            progress=False,
            process_group=process_group,
        )
except LabError as e:
    sys.exit(f"clip475: {e}")
"""
    (place / "dying.py").write_text(script)
    # the meeting place is held open here, as torchrun does it, and its port belongs to nobody else
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    joined["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    pair = [
        subprocess.Popen(
            [sys.executable, "dying.py"],
            cwd=place,
            env=environment(place) | joined | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        said = [p.communicate()[1] for p in pair]
    finally:
        [p.kill() for p in pair if p.poll() is None]
    check_code(pair[1].returncode, -signal.SIGKILL, "", said[1])
    check_code(pair[0].returncode, 1, "", said[0])
    assert "has lost the others" in said[0] and "--resume" in said[0] and "Traceback" not in said[0], said[0][
        -2000:
    ]
    assert len(pd.read_csv(place / "dying" / "metrics.csv")) == 1  # what was finished is kept
