#!/usr/bin/env python3
"""Search in a folder of small pictures: embedding all of them, and each later search.

    python bench/folder_search.py [--pictures 10000] [--model RUN] > results/folder_search.txt

Without --model, a model of the preset tiny with random weights: what is measured is the folder search. The
second search is a median of five, with the model loaded; its parts are medians of five too.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"


def seconds(work, times=5):
    def once():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(times))


def make_pictures(folder, count):
    "Small JPEGs of soft colours, a hundred in a folder, no two alike."
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(475)
    for i in range(count):
        place = folder / f"{i // 100:03}"
        place.mkdir(parents=True, exist_ok=True)
        few = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8))
        few.resize((96, 72), Image.Resampling.BICUBIC).save(place / f"picture {i}.jpg")


def random_model(folder):
    import torch

    from clip475.core.config import LabConfig
    from clip475.models.joint import build_model, save_model

    torch.manual_seed(475)
    config = LabConfig.from_preset("tiny")
    save_model(build_model(config), config, folder)
    return folder


def measure(options, work):
    import torch

    torch.set_num_threads(1)
    from clip475.searching import folder as searching
    from clip475.searching.model import load

    album = (work / "album").resolve()
    make_pictures(album, options.pictures)
    model = load(options.model or random_model(work / "run"))

    def find(query="a red boat"):
        return searching.search(query, album, 10, model, progress=False)

    model.encode_text("warm up")
    start = time.perf_counter()
    assert find().embedded == options.pictures
    first = time.perf_counter() - start
    again = seconds(find)

    file = searching._index_file(album, model)
    present, index = searching._pictures_in(album)[0], searching._read_index(file)
    gallery = index.gallery(list(present))
    parts = {
        "walk and stat": lambda: searching._pictures_in(album),
        "read the index and check its hash": lambda: searching._read_index(file),
        "compare names and stamps": lambda: index.restricted_to(present),
        "stack the embeddings": lambda: index.gallery(list(present)),
        "embed the text": lambda: model.encode_text("a red boat"),
        "similarity and the best ten": lambda: searching._nearest(model.encode_text("a")[0], gallery, 10),
    }
    times = {name: seconds(part) for name, part in parts.items()}
    shutil.move(album / "000", album / "moved")
    start = time.perf_counter()
    assert find().embedded == 0
    moved = time.perf_counter() - start
    return first, again, times, moved, file.stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--model", help="a run folder or a shipped model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CLIP475_CACHE"] = str(Path(scratch) / "cache")
        first, again, times, moved, size = measure(options, Path(scratch))
    name = options.model or "preset tiny, random weights"
    print(f"{options.pictures:,} JPEGs of 96 × 72 pixels; model: {name}; one thread of torch")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print(f"first search, all embedded   {first:8.2f} s   {options.pictures / first:,.0f} pictures/s")
    print(f"second search, none embedded {again:8.3f} s   {first / again:,.0f} times as fast")
    print(f"after 100 files have moved   {moved:8.3f} s   none embedded")
    print(f"index in the cache           {size / 1e6:8.1f} MB\n")
    print("parts of the second search:")
    for part, took in times.items():
        print(f"  {part:<34} {took:7.3f} s")


if __name__ == "__main__":
    main()
