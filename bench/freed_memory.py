"""What it costs that the allocator gives freed memory back to the system.

    python bench/freed_memory.py --json > results/freed_memory.json

Training steps of the image tower on one core, each way in a process of its own, in turns: as glibc sets its
allocator, and with `clip475.core.devices._keep_freed_memory`. Counted are processor seconds, those of the
program and those of the system, so that other work on the machine changes little; and the largest memory.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # preset, changes of it, pixels, images in a step
    "tiny, 64 px": ("tiny", {}, 64, 128),
    "photos, upper blocks, 160 px": ("photos", {"policy": "last-n", "policy_blocks": 11}, 160, 64),
    "photos, upper blocks, 224 px": ("photos", {"policy": "last-n", "policy_blocks": 11}, 224, 64),
    "ResNet50, 224 px": ("tiny", {"backbone": "resnet50", "backbone_weights": None}, 224, 16),
}
CHILD = """
import json, resource, sys
import torch
from clip475.core.config import LabConfig
from clip475.core.devices import _keep_freed_memory
from clip475.models.joint import build_model
from clip475.models.policies import apply_policy

kept, preset, changes, side, images, steps = json.loads(sys.argv[1])
if kept and not _keep_freed_memory():
    sys.exit("the allocator of this system cannot be told to keep memory")
torch.set_num_threads(1)
config = LabConfig.from_preset(preset, **changes, cache_features=False)
model = build_model(config)
apply_policy(model, config.policy, n=config.policy_blocks)
model = model.to(memory_format=torch.channels_last).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
pixels = torch.randn(images, 3, side, side).contiguous(memory_format=torch.channels_last)
for step in range(steps + 2):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF)
    model.encode_image(pixels).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
after = resource.getrusage(resource.RUSAGE_SELF)
times = [(getattr(after, name) - getattr(before, name)) / steps for name in ("ru_utime", "ru_stime")]
print(json.dumps([*times, after.ru_maxrss / 1024]))
"""


def measure(kept, shape, steps):
    "Processor seconds of program and system in a step, and the largest memory in MB, from a new process."
    unset = ("MALLOC_", "GLIBC_TUNABLES", "OMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    command = [sys.executable, "-c", CHILD, json.dumps([kept, *shape, steps])]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if child.returncode:
        sys.exit(child.stderr[-2000:])
    return json.loads(child.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {}
    for name, shape in SHAPES.items():
        runs = {"given back": [], "kept": []}
        for _ in range(args.rounds):
            for way in runs:
                runs[way].append(measure(way == "kept", shape, args.steps))
        row = {}
        for way, some in runs.items():
            program, system, memory = (median(values) for values in zip(*some))
            row[way] = {
                "program seconds": round(program, 3),
                "system seconds": round(system, 3),
                "images a second": round(shape[3] / (program + system), 1),
                "largest memory (MB)": round(memory),
            }
        times = [sum(row[way][f"{part} seconds"] for part in ("program", "system")) for way in runs]
        row["times as fast"] = round(times[0] / times[1], 2)
        row["share of the system, given back"] = round(row["given back"]["system seconds"] / times[0], 2)
        found[name] = row
        if not args.json:
            print(name, row)
    if args.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
