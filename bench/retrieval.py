#!/usr/bin/env python3
"""Recall@K in blocks (clip475) beside two ways with one big matrix: time, memory, and whether the results agree.

    python bench/retrieval.py [--images 3000] [--captions 5] [--dim 512] [--threads N] [--json]

Each way runs in a process of its own, on the same made-up embeddings; memory is the growth of the process's peak during
the evaluation. `matrix` is a second implementation of the same definition, in NumPy on the full float64 matrix, and has
to find the same rank for every query. `argsort` is what is often seen: a float32 matrix, sorted whole in both directions.
"""
import argparse, hashlib, json, resource, subprocess, sys, time


def embeddings(options):
    import torch
    import torch.nn.functional as F
    generator = torch.Generator().manual_seed(475)
    owner = torch.arange(options.images).repeat_interleave(options.captions)  # (M,)
    images = F.normalize(torch.randn(options.images, options.dim, generator=generator), dim=-1)  # (N, D)
    noise = 4 * torch.randn(len(owner), options.dim, generator=generator) / options.dim**.5  # (M, D)
    return images, F.normalize(images[owner] + noise, dim=-1), owner


def in_blocks(images, texts, owner):
    import torch
    from clip475.retrieval import ranks
    rows = torch.arange(len(images))
    return ranks(images, texts, rows, owner).numpy(), ranks(texts, images, owner, rows).numpy()


def one_matrix(images, texts, owner):
    import numpy as np
    unit = [x.double().numpy() for x in (images, texts)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    scores, owner, captions = np.rint(unit[0] @ unit[1].T * 2**24), owner.numpy(), np.arange(len(owner))  # (N, M)
    right = scores[owner, captions]  # (M,)
    scores[owner, captions] = -np.inf
    best = np.full(len(images), -np.inf)
    np.maximum.at(best, owner, right)  # (N,)
    return 1 + (scores >= best[:, None]).sum(1), 1 + (scores >= right).sum(0)


def argsort(images, texts, owner):
    import torch
    scores = images @ texts.T  # (N, M)
    i2t = owner[scores.argsort(dim=1, descending=True)] == torch.arange(len(images))[:, None]
    t2i = scores.T.argsort(dim=1, descending=True) == owner[:, None]
    return [1 + right.int().argmax(1).numpy() for right in (i2t, t2i)]


WAYS = {"blocks": in_blocks, "matrix": one_matrix, "argsort": argsort}


def peak_mb():
    "The most memory this process ever held."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(options):
    "Run one way in this process."
    import torch
    if options.threads: torch.set_num_threads(options.threads)
    data = embeddings(options)
    if options.way == "blocks": import clip475.retrieval
    before, start = peak_mb(), time.perf_counter()
    found = WAYS[options.way](*data)
    return {"seconds": round(time.perf_counter() - start, 2), "peak_mb": round(peak_mb() - before), "r1": [float((ranks <= 1).mean()) for ranks in found],
            "ranks": hashlib.sha256(b"".join(ranks.astype("int64").tobytes() for ranks in found)).hexdigest()[:16]}


def compare(options):
    "Run every way in a process of its own."
    command = [sys.executable, __file__, "--json", *(f"--{k}={getattr(options, k)}" for k in ("images", "captions", "dim", "threads"))]
    ways = {way: json.loads(subprocess.run([*command, f"--way={way}"], check=True, capture_output=True, text=True).stdout) for way in WAYS}
    blocks, matrix, usual = ways.values()
    return {"images": options.images, "captions": options.images * options.captions, "dim": options.dim, "ways": ways,
            "equal": blocks["ranks"] == matrix["ranks"], "time_ratio": round(blocks["seconds"] / matrix["seconds"], 2), "memory_ratio": round(blocks["peak_mb"] / matrix["peak_mb"], 3),
            "argsort_time_ratio": round(blocks["seconds"] / usual["seconds"], 2), "argsort_memory_ratio": round(blocks["peak_mb"] / usual["peak_mb"], 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"images": 3000, "captions": 5, "dim": 512, "threads": 0}.items(): parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--way", choices=list(WAYS), help="run only this one, in this process")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    result = measure(options) if options.way else compare(options)
    if options.json or options.way: print(json.dumps(result))
    else:
        print(f"{result['images']:,} images, {result['captions']:,} captions, {result['dim']} wide\n\n| way | seconds | peak memory (MB) | R@1 i2t, t2i |\n| --- | ---: | ---: | --- |")
        for way, row in result["ways"].items(): print(f"| {way} | {row['seconds']} | {row['peak_mb']:,} | {row['r1'][0]:.4f}, {row['r1'][1]:.4f} |")
        print(f"\nblocks and matrix find the same ranks: {'yes' if result['equal'] else 'NO'}")
    return 0 if result.get("equal", True) else 1


if __name__ == "__main__":
    sys.exit(main())
