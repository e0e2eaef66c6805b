#!/usr/bin/env python3
"""Gradient caching beside the plain step at the same batch: time, memory, gradient; and a large batch in the
memory of a chunk.

    python bench/gradcache.py [--batch 512] [--chunk 64] [--large 4096] [--size 64] [--backbone resnet10] \\
        [--threads N] [--json]

Time: plain and cached steps (forward, loss, backward; float32) in turn in one process, the median of
each. Memory: each step in a process of its own; `resident_mb` is the growth of the process's peak
during the step, `saved_mb` the most that autograd kept for the backward pass at once. BatchNorm is in
evaluation mode, so that both gradients are of the same function. `the loss alone` is what the B x B
matrices of InfoNCE take, whatever the tower.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def peak_mb():
    "The most memory this process ever held."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def setup(options, batch):
    "An image tower, its scale, and `batch` pairs."
    import torch
    import torch.nn.functional as F

    from clip475.models.joint import ImageEncoder, build_backbone, projection_head

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(475)
    backbone, width = build_backbone(options.backbone)
    tower = (
        ImageEncoder(backbone, projection_head(width, 512, 512)).eval().to(memory_format=torch.channels_last)
    )
    pixels = torch.randn(batch, 3, options.size, options.size).to(
        memory_format=torch.channels_last
    )  # (B, 3, S, S)
    return tower, torch.nn.Parameter(torch.tensor(2.66)), pixels, F.normalize(torch.randn(batch, 512), dim=-1)


def steps(options, batch):
    "The tower, what is there anyway, and the steps to compare."
    from clip475.training.large_batches import cached_backward
    from clip475.training.loss import info_nce

    tower, scale, pixels, texts = setup(options, batch)

    def plain():
        info_nce(tower(pixels), texts, scale).backward()

    def cached():
        cached_backward(tower, pixels.split(options.chunk), lambda e: info_nce(e, texts, scale), module=tower)

    def loss():
        info_nce(texts.roll(1, 0).requires_grad_(), texts, scale).backward()

    return tower, (*tower.parameters(), pixels, texts), {"plain": plain, "cached": cached, "loss": loss}


def gradient(tower, step):
    import torch

    tower.zero_grad()
    step()
    return torch.cat([p.grad.flatten() for p in tower.parameters()])


def clock(options):
    "Seconds of both steps, taken in turn, and how far their gradients are apart."
    tower, _, ways = steps(options, options.batch)
    both = {name: ways[name] for name in ("plain", "cached")}
    plain, cached = (gradient(tower, step) for step in both.values())  # a warm-up, too
    taken = {name: [] for name in both}
    for _ in range(options.repeats):
        for name, step in both.items():
            start = time.perf_counter(), time.process_time()
            gradient(tower, step)
            taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    seconds, cpu = (
        {name: round(statistics.median(t[i] for t in times), 3) for name, times in taken.items()}
        for i in (0, 1)
    )
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "gradient_difference": float((plain - cached).norm() / plain.norm()),
    }


def memory(options):
    "What one step adds to this process, and the most that autograd keeps in it."
    from clip475.training.large_batches import _peak_saved_bytes

    way, batch = options.memory.split(":")
    tower, there, ways = steps(options, int(batch))
    before, start = peak_mb(), time.perf_counter()
    saved = _peak_saved_bytes(ways[way], there) / 2**20
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "resident_mb": round(peak_mb() - before),
        "saved_mb": round(saved, 1),
    }


def child(options, *args):
    command = [sys.executable, __file__, *(f"--{k}={getattr(options, k)}" for k in DEFAULTS)]
    return json.loads(subprocess.run([*command, *args], check=True, capture_output=True, text=True).stdout)


def compare(options):
    "Every measurement in a process of its own."
    import torch

    times = child(options, "--clock")
    wanted = {
        "plain, one chunk": ("plain", options.chunk),
        "plain": ("plain", options.batch),
        "cached": ("cached", options.batch),
        "cached, large": ("cached", options.large),
        "the loss alone, large": ("loss", options.large),
    }
    rows = {
        name: {"batch": batch, **child(options, f"--memory={way}:{batch}")}
        for name, (way, batch) in wanted.items()
    }
    return {
        "backbone": options.backbone,
        "size": options.size,
        "chunk": options.chunk,
        "threads": options.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        **times,
        "time_ratio": round(times["seconds"]["cached"] / times["seconds"]["plain"], 3),
        "cpu_ratio": round(times["cpu_seconds"]["cached"] / times["cpu_seconds"]["plain"], 3),
        "memory": rows,
    }


DEFAULTS = {
    "batch": 512,
    "chunk": 64,
    "large": 4096,
    "size": 64,
    "backbone": "resnet10",
    "threads": 0,
    "repeats": 5,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--clock", action="store_true", help="only the times, in this process")
    parser.add_argument("--memory", metavar="WAY:BATCH", help="only the memory of one step, in this process")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    result = clock(options) if options.clock else memory(options) if options.memory else compare(options)
    if options.json or options.clock or options.memory:
        return print(json.dumps(result))
    seconds = result["seconds"]
    print(
        f"{result['backbone']}, {result['size']} px, chunks of {result['chunk']}, {result['threads']} "
        "threads\n"
    )
    print(
        f"a step of {options.batch}: plain {seconds['plain']} s, cached {seconds['cached']} s, ratio "
        f"{result['time_ratio']} ({result['cpu_ratio']} in CPU seconds, which a busy machine disturbs less); "
        f"gradients differ by {result['gradient_difference']:.1e}\n"
    )
    print(
        "| step | batch | seconds, first step | resident (MB) | kept by autograd (MB) |\n| --- | ---: | ---: "
        "| ---: | ---: |"
    )
    for name, row in result["memory"].items():
        print(
            f"| {name} | {row['batch']:,} | {row['seconds']} | {row['resident_mb']:,} | {row['saved_mb']:,} |"
        )


if __name__ == "__main__":
    sys.exit(main())
