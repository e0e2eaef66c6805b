"""How fast training is beside other work, and what helps: python bench/threads.py

Training steps (preset tiny) run in a process for each way to use threads: as torch sets them, with
OMP_WAIT_POLICY=PASSIVE, with one thread, and so on. The parent starts processes that only count beside it,
and asks each child in turn for its images per second. The ways take turns; the median of the rounds counts.
On a machine with other work, as root on Linux, a session of its own keeps that out:
setsid sh -c 'echo -15 > /proc/self/autogroup; exec python bench/threads.py'
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "as torch sets it": {},
    "waiting passively": {"OMP_WAIT_POLICY": "PASSIVE"},
    "waiting passively, one thread between operations": {"OMP_WAIT_POLICY": "PASSIVE", "INTEROP": "1"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CHILD = """
import os, sys, time
import torch
if "INTEROP" in os.environ:
    torch.set_num_interop_threads(int(os.environ["INTEROP"]))
from clip475.core.config import LabConfig
from clip475.training.batches import epoch_batches, prepare_data
from clip475.training.steps import start_training, train_step

config = LabConfig.from_preset("tiny", train_images=256, val_images=8)
train, val = prepare_data(config, progress=False)
state = start_training(config)
pixels, texts, rows, text_rows = next(epoch_batches(train, config, 0, state.process_group))

def images_per_second(seconds):
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        train_step(state, pixels, texts, rows, 1e-4, config, text_rows)
        images += len(pixels)
    return images / (time.perf_counter() - start)

images_per_second(0.5)
print(torch.get_num_threads(), flush=True)
for line in sys.stdin:
    print(images_per_second(float(line)), flush=True)
"""


def start(way):
    "A child that measures when it is asked to, and its number of threads."
    unset = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | way
    command = [sys.executable, "-c", CHILD]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    return child, int(child.stdout.readline())


def measure(child, busy, seconds):
    "Images per second of `child` beside `busy` processes that count."
    counting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        time.sleep(0.2)
        child.stdin.write(f"{seconds}\n")
        child.stdin.flush()
        return float(child.stdout.readline())
    finally:
        for process in counting:
            process.kill()
            process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    children = {name: start(way) for name, way in WAYS.items()}
    found = {(name, busy): [] for name in WAYS for busy in range(3)}
    for _ in range(options.rounds):
        for (name, busy), numbers in found.items():
            numbers.append(measure(children[name][0], busy, options.seconds))
    for child, _ in children.values():
        child.stdin.close()
        child.wait()
    print(f"images/s of training, {os.cpu_count()} cores, beside 0, 1 and 2 busy processes (median, range)")
    for name in WAYS:
        cells = [found[name, busy] for busy in range(3)]
        text = "   ".join(f"{median(n):4.0f} ({min(n):.0f}–{max(n):.0f})" for n in cells)
        print(f"{name + f', {children[name][1]} threads':62} {text}")
