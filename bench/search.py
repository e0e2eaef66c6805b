#!/usr/bin/env python3
"""Top-k of one query over many images on one core: clip475's exact index beside a plain NumPy scan and
faiss's flat index; and how long opening takes.

    python bench/search.py [--images 100000] [--dim 512] [-k 10] [--queries 20] [--json]

Milliseconds are medians over the queries, after one to warm up. `answer` is `SearchIndex.search_text`
as a person gets it, with captions and paths; `nearest` the exact rows and scores alone; `numpy` a
float32 product and argpartition, near ties as they fall; `faiss` is skipped where faiss-cpu is not
installed.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path


def milliseconds(work, queries):
    work(queries[0])

    def once(query):
        start = time.perf_counter()
        work(query)
        return 1e3 * (time.perf_counter() - start)

    return round(statistics.median(once(q) for q in queries), 1)


def measure(options):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import numpy as np
    import torch

    torch.set_num_threads(1)
    from clip475.searching.index import SearchIndex

    generator = torch.Generator().manual_seed(475)
    images = torch.nn.functional.normalize(
        torch.randn(options.images, options.dim, generator=generator), dim=-1
    )
    queries = list(torch.randn(options.queries, options.dim, generator=generator))
    with tempfile.TemporaryDirectory() as scratch:
        rows = range(options.images)
        folder = SearchIndex.build(
            images, [f"images/{i}.jpg" for i in rows], rows, images, [f"caption {i}" for i in rows], rows
        ).save(Path(scratch) / "index")
        start = time.perf_counter()
        index = SearchIndex.open(folder)
        opened = time.perf_counter() - start
        gallery = index.image_embeddings
        plain = gallery.numpy()

        def numpy_scan(q):
            scores = plain @ q.numpy()
            best = np.argpartition(-scores, options.k)[: options.k]
            return best[np.argsort(-scores[best])]

        result = {
            "images": options.images,
            "dim": options.dim,
            "k": options.k,
            "open_seconds": round(opened, 3),
            "answer_ms": milliseconds(lambda q: index.search_text(q, options.k), queries),
            "nearest_ms": milliseconds(lambda q: index._nearest(q, gallery, options.k, "images"), queries),
            "numpy_ms": milliseconds(numpy_scan, queries),
        }
        result["equal_to_numpy"] = all(
            index.search_text(q, options.k).rows == numpy_scan(q).tolist() for q in queries[:5]
        )
        if importlib.util.find_spec("faiss"):
            import faiss

            faiss.omp_set_num_threads(1)
            flat = faiss.IndexFlatIP(options.dim)
            flat.add(plain)
            result["faiss_ms"] = milliseconds(lambda q: flat.search(q[None].numpy(), options.k), queries)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"images": 100_000, "dim": 512, "queries": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    result = measure(options)
    print(
        json.dumps(result)
        if options.json
        else "\n".join(f"{name:>16} {value}" for name, value in result.items())
    )


if __name__ == "__main__":
    sys.exit(main())
