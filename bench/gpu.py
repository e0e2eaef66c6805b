"""All GPU measurements that this repository owes, in one call of at most eight minutes.

bash bench/gpu.sh [--photos DIR] [--minutes 8] [--out results/gpu.json] [--tiny]

One after the other, each in a process of its own with what is left of the time; what is finished stands in
the file at any moment, and a part that fails or runs out of time leaves one sentence there:
(train)    bench/train.py at the specification's shapes, batch 256: images/s of the lab's step beside its own
           forward and backward alone, open_clip's loop and a plain loop, and the peak of the memory
(ways)     the lab's step in float32, float16 and bfloat16, compiled, with gradient caching in parts of 64,
           and with the weights in the plain memory format: images/s and the peak of the memory
(tests)    the tests that need a GPU
(photos)   bench/photos.py: the preset's head and then the whole tower on captioned photographs (`--photos`,
           by default ../shared/data/flickr8k); left out where there are none

`--tiny` runs the same on a CPU with small shapes, which shows that the script works and measures nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "float32": {"precision": "fp32"},
    "float16": {"precision": "fp16"},
    "bfloat16": {"precision": "bf16"},
    "bfloat16, plain memory format": {"precision": "bf16"},
    "bfloat16, compiled": {"precision": "bf16", "compile": True},
    "bfloat16, parts of 64": {"precision": "bf16", "micro_batch": 64},
    "float16, parts of 64": {"precision": "fp16", "micro_batch": 64},
}


def one_way(name, batch, size, steps):
    "Images per second and peak memory of the lab's step, on random pixels that are on the device already."
    import torch
    import torch.nn.functional as F
    from train import shapes_of_the_specification

    from clip475.core.devices import pick_device
    from clip475.training.steps import _set_training_mode, start_training, train_step

    device = pick_device()
    config = shapes_of_the_specification(batch, size, **WAYS[name])
    state = start_training(config)
    if "plain" in name:
        state.model.to(memory_format=torch.contiguous_format)
    _set_training_mode(state.model, config)
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    texts = F.normalize(torch.randn(batch, config.embedding_dim, device=device), dim=-1)
    rows = torch.arange(batch, device=device)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        train_step(state, pixels, texts, rows, 3e-4, config, rows)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    found = {"images_per_second": round(batch / median(seconds[steps // 2 :]), 1)}
    found["seconds of the first step"] = round(seconds[0], 1)
    if device.type == "cuda":
        found["peak memory, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


def device_facts():
    import torch

    has = torch.cuda.is_available()
    facts = {"device": torch.cuda.get_device_name() if has else "cpu", "torch": torch.__version__}
    return facts | ({"memory, GB": round(torch.cuda.mem_get_info()[1] / 1e9, 1)} if has else {})


class Clock:
    "What is left of the minutes, and the file that holds what is finished."

    def __init__(self, minutes, out, command):
        self.end, self.out = time.monotonic() + 60 * minutes, Path(out)
        self.found = {"command": command} | device_facts()

    def left(self):
        return self.end - time.monotonic()

    def keep(self, *names_and_value):
        *outer, name, value = names_and_value
        place = self.found
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = value
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(*outer, name, value, sep=": ", flush=True)

    def run(self, *command):
        "What a command printed, or one sentence about why it failed; and whether it ended well."
        if self.left() < 5:
            return "not run: the minutes were over", False
        started = time.monotonic()
        command = [sys.executable, *map(str, command)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.left(), cwd=ROOT)
        except subprocess.TimeoutExpired:
            return f"stopped after {time.monotonic() - started:.0f} s: the minutes were over", False
        if done.returncode == 0:
            return done.stdout, True
        return (done.stderr.strip().splitlines() or [f"failed without a word, code {done.returncode}"])[
            -1
        ], False

    def measure(self, *names, command):
        "Keep the JSON object that a command prints, from its first brace on."
        said, fine = self.run(*command)
        self.keep(*names, json.loads(said[said.index("{") :]) if fine else said)
        return fine


def photographs(clock, folder, tiny):
    with tempfile.TemporaryDirectory() as place:
        data, runs = Path(place) / "data", Path(place) / "runs"
        said, fine = clock.run(
            "bench/photos.py", "data", data, "--flickr8k", folder, *(["--val", 8] if tiny else [])
        )
        if not fine:
            return clock.keep("photos", said)
        clock.keep("photos", "pictures", json.loads(said))
        less = ["--set", "epochs=1", "--set", "batch_size=8"] if tiny else []
        head = runs / "head"
        arms = {"head": [], "whole": ["--start-from", head]}
        for arm, more in arms.items():
            command = ["bench/photos.py", "arm", arm, data, "--run", runs / arm, *more, *less]
            if not clock.measure("photos", arm, command=command):
                return None


def everything(args):
    clock = Clock(args.minutes, args.out, "bash bench/gpu.sh" + (" --tiny" if args.tiny else ""))
    batch, size, steps = (8, 32, 4) if args.tiny else (256, 224, 20)
    train = ["bench/train.py", "--batch", batch, "--rounds", 1 if args.tiny else 10, "--json"]
    clock.measure("train", command=[*train, "--size", size])
    for way in WAYS:
        shapes = ["--batch", batch, "--size", size, "--steps", steps]
        clock.measure("ways", way, command=["bench/gpu.py", "--way", way, *shapes])
    said, fine = clock.run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_meters.py",
        "tests/test_images.py",
        "-k",
        "gpu",
    )
    clock.keep("tests", said.strip().splitlines()[-1])
    photos = Path(args.photos)
    if photos.is_dir():
        photographs(clock, photos.resolve(), args.tiny)
    else:
        clock.keep("photos", f"not run: {photos} is no folder; name captioned photographs with --photos")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", default=str(ROOT.parent / "shared" / "data" / "flickr8k"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", default=str(ROOT / "results" / "gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="small shapes on any device")
    parser.add_argument("--way", choices=list(WAYS), help="one way alone, in this process")
    for name in ("batch", "size", "steps"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return print(json.dumps(one_way(args.way, args.batch, args.size, args.steps)))
    return everything(args)


if __name__ == "__main__":
    sys.exit(main())
