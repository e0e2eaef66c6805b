"""What `reuse_freed_memory` buys: python bench/memory.py [--json]

The same training steps (preset tiny, batch 128, random pixels) with and without it, in fresh processes, in turn; prints
the median seconds a step of each and their ratio. More than 1 means that keeping freed memory is faster.
"""
import json, statistics, subprocess, sys
from time import perf_counter


def median_step(reuse, steps=12):
    "Median seconds of a training step in this process."
    import torch
    from clip475.core import LabConfig
    from clip475.train import reuse_freed_memory, start_training, train_step
    if reuse: reuse_freed_memory()
    config = LabConfig.from_preset("tiny")
    state, generator = start_training(config), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (config.batch_size, config.image_size, config.image_size, 3), dtype=torch.uint8, generator=generator)
    texts = torch.nn.functional.normalize(torch.randn(config.batch_size, config.embedding_dim, generator=generator), dim=-1)
    def once():
        start = perf_counter()
        train_step(state, pixels, texts, torch.arange(config.batch_size), 1e-4, config)
        return perf_counter() - start
    return statistics.median([once() for _ in range(steps)][2:])


def in_fresh_process(reuse): return float(subprocess.run([sys.executable, __file__, "--one", str(int(reuse))], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    if "--one" in sys.argv: sys.exit(print(median_step(sys.argv[-1] == "1")))
    pairs = [(in_fresh_process(False), in_fresh_process(True)) for _ in range(3)]
    found = {"default_seconds": statistics.median(p[0] for p in pairs), "reuse_seconds": statistics.median(p[1] for p in pairs), "ratio": statistics.median(a/b for a, b in pairs)}
    print(json.dumps({k: round(v, 3) for k, v in found.items()}) if "--json" in sys.argv else "\n".join(f"{k:16} {v:.3f}" for k, v in found.items()))
