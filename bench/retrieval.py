#!/usr/bin/env python3
"""Recall@K and mAP@R of clip475 beside the bare matrix product, and beside other ways to the same numbers.

    python bench/retrieval.py [--images 6000] [--captions 30000] [--dim 512] [--threads N] [--noise 8] \\
        [--json]
    python bench/retrieval.py --full                # COCO's validation set: 40,504 images, 202,654 captions

The product is float32, in tiles, thrown away; it and `evaluate_retrieval` (both directions, ranks,
mAP@R, no bootstrap) take turns in one process. Then each way runs in a process of its own, on the same
made-up embeddings, and its largest resident memory (`peak_mb`, all of the process) is noted: `clip475`;
`matrix`, a second implementation of the definition on the whole float64 matrix, which has to find the
same ranks; `argsort`, what is often seen, the float32 matrix sorted whole in both directions; `faiss`,
its flat index asked for the first ten in both directions (skipped where faiss-cpu is not installed).
--full leaves out `matrix` and `argsort`, which would need 66 GB. A higher --noise makes a worse model,
whose ranks are more work; 1000 guesses.
"""

import argparse
import hashlib
import importlib.util
import json
import resource
import subprocess
import sys
import time

FULL = {"images": 40_504, "captions": 202_654}


def embeddings(options):
    "(N, D), (M, D) and (M,): captions around their images, made slice by slice."
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(475)
    owner = (torch.arange(options.captions) * options.images) // options.captions
    images = F.normalize(torch.randn(options.images, options.dim, generator=generator), dim=-1)
    texts = torch.empty(options.captions, options.dim)
    for a in range(0, len(texts), 4096):
        noise = (
            options.noise
            * torch.randn(len(texts[a : a + 4096]), options.dim, generator=generator)
            / options.dim**0.5
        )
        texts[a : a + 4096] = F.normalize(images[owner[a : a + 4096]] + noise, dim=-1)
    return images, texts, owner


def of_clip475(images, texts, owner):
    from clip475.evaluation.retrieval import _both_ways

    found, precision, _ = _both_ways(images, texts, owner, None)
    return [found[way].numpy() for way in ("i2t", "t2i")] + [precision]


def bare(images, texts, owner, tall=1024, wide=1024):  # the quickest tiles on the machine of results/
    for a in range(0, len(images), tall):
        for b in range(0, len(texts), wide):
            images[a : a + tall] @ texts[b : b + wide].T


def one_matrix(images, texts, owner):
    import numpy as np

    unit = [x.double().numpy() for x in (images, texts)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    scores, owner, captions = (
        np.rint(unit[0] @ unit[1].T * 2**24),
        owner.numpy(),
        np.arange(len(owner)),
    )  # (N, M)
    right = scores[owner, captions]  # (M,)
    scores[owner, captions] = -np.inf
    best = np.full(len(images), -np.inf)
    np.maximum.at(best, owner, right)  # (N,)
    return [1 + (scores >= best[:, None]).sum(1), 1 + (scores >= right).sum(0)]


def argsort(images, texts, owner):
    import torch

    scores = images @ texts.T  # (N, M)
    i2t = owner[scores.argsort(dim=1, descending=True)] == torch.arange(len(images))[:, None]
    t2i = scores.T.argsort(dim=1, descending=True) == owner[:, None]
    return [1 + right.int().argmax(1).numpy() for right in (i2t, t2i)]


def of_faiss(images, texts, owner, k=10):
    import faiss
    import numpy as np

    def first(query, gallery):
        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery.numpy())
        return index.search(query.numpy(), k)[1]

    owner = owner.numpy()
    i2t, t2i = (
        owner[first(images, texts)] == np.arange(len(images))[:, None],
        first(texts, images) == owner[:, None],
    )
    return [np.where(right.any(1), right.argmax(1) + 1, k + 1) for right in (i2t, t2i)]


WAYS = {"clip475": of_clip475, "matrix": one_matrix, "argsort": argsort, "faiss": of_faiss}


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def seconds(work, data):
    start = time.perf_counter()
    result = work(*data)
    return time.perf_counter() - start, result


def one_way(options):
    "One way in this process."
    data = embeddings(options)
    taken, found = seconds(WAYS[options.way], data)
    return {
        "seconds": round(taken, 2),
        "peak_mb": round(peak_mb()),
        "r1": [float((ranks <= 1).mean()) for ranks in found[:2]],
        "ranks": hashlib.sha256(b"".join(ranks.astype("int64").tobytes() for ranks in found[:2])).hexdigest()[
            :16
        ],
        "ranks_to_10": hashlib.sha256(
            b"".join(ranks.clip(max=11).astype("int64").tobytes() for ranks in found[:2])
        ).hexdigest()[:16],
    }


def beside_the_product(options):
    "The product and clip475 in turns, the quickest of each."
    data, rounds = embeddings(options), 2 if options.full else 3
    small = (data[0][:64], data[1][data[2] < 64], data[2][data[2] < 64])
    for work in (bare, of_clip475):
        work(*small)  # the first call loads libraries
    taken = [(seconds(bare, data)[0], seconds(of_clip475, data)[0]) for _ in range(rounds)]
    product, ours = map(min, zip(*taken))
    return {
        "product_seconds": round(product, 2),
        "clip475_seconds": round(ours, 2),
        "ratio": round(ours / product, 2),
        "gflops": round(2e-9 * options.images * options.captions * options.dim / product, 1),
    }


def compare(options):
    fields = ("images", "captions", "dim", "threads", "noise")
    command = [
        sys.executable,
        __file__,
        "--json",
        *(f"--{k}={getattr(options, k)}" for k in fields),
        *(["--full"] if options.full else []),
    ]

    def run(way):
        return json.loads(
            subprocess.run([*command, f"--way={way}"], check=True, capture_output=True, text=True).stdout
        )

    ways = (
        ["clip475"]
        + ([] if options.full else ["matrix", "argsort"])
        + (["faiss"] if importlib.util.find_spec("faiss") else [])
    )
    result = (
        {k: getattr(options, k) for k in fields} | run("product") | {"ways": {way: run(way) for way in ways}}
    )
    result["peak_mb"] = result["ways"]["clip475"]["peak_mb"]
    result["equal"] = all(
        result["ways"][way][key] == result["ways"]["clip475"][key]
        for way, key in (("matrix", "ranks"),)
        if way in ways
    )
    result["faiss_equal_to_10"] = (
        "faiss" in ways and result["ways"]["faiss"]["ranks_to_10"] == result["ways"]["clip475"]["ranks_to_10"]
    )  # float32: may miss a near tie
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"images": 6000, "captions": 30_000, "dim": 512, "threads": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--noise", type=float, default=8, help="how bad the model is (default: 8, a Recall@1 near a half)"
    )
    parser.add_argument("--full", action="store_true", help="40,504 images and 202,654 captions, minutes")
    parser.add_argument("--way", choices=[*WAYS, "product"], help="run only this one, in this process")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if options.full:
        vars(options).update(FULL)
    if options.way:
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        print(json.dumps(beside_the_product(options) if options.way == "product" else one_way(options)))
        return 0
    result = compare(options)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['images']:,} images, {result['captions']:,} captions, {result['dim']} wide\n\nbare "
            f"product {result['product_seconds']} s ({result['gflops']} GFLOP/s), clip475 "
            f"{result['clip475_seconds']} s: {result['ratio']} of it\n\n| way | seconds | peak memory (MB) | "
            "R@1 i2t, t2i |\n| --- | ---: | ---: | --- |"
        )
        for way, row in result["ways"].items():
            print(
                f"| {way} | {row['seconds']} | {row['peak_mb']:,} | {row['r1'][0]:.4f}, {row['r1'][1]:.4f} |"
            )
        if "matrix" in result["ways"]:
            print(f"\nclip475 and matrix find the same ranks: {'yes' if result['equal'] else 'NO'}")
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
