#!/usr/bin/env python3
"""What it costs to check, at each opening, that no byte has changed.

    python bench/checksums.py [--images 4000] [--size 224] [--work DIR] > results/checksums.txt

`pictures` are copies of the photographs that ship, `packed` an array as `pack_images` makes it, `index` the
files of a search index of as many images with five captions each. Everything is in the page cache, as right
after it was written: what is measured is the work of the checks, not the disk. Medians of three.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from clip475.core.files import read_json
from clip475.data.captions import CaptionSplit
from clip475.data.images import _checksum, _contents
from clip475.data.photos import load_photos
from clip475.searching.index import _MANIFEST, SearchIndex, _check_bytes


def seconds(work):
    def once():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(3))


def line(name, spent, size, note):
    print(f"{name:40} {spent:7.3f} s  {size / 1e6:7.1f} MB  {note}")


def pictures_of(folder, count):
    "Copies of the photographs as a split."
    folder.mkdir()
    paths = [folder / f"{i:06}.jpg" for i in range(count)]
    for path, photo in zip(paths, itertools.cycle(load_photos())):
        shutil.copyfile(photo.path, path)
    return CaptionSplit("val", folder, np.arange(count), paths, ["a photograph"] * count, np.arange(count))


def packed_of(file, count, size):
    packed = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
    rng = np.random.default_rng(0)
    for row in packed:
        row[:] = rng.integers(0, 256, row.shape, dtype=np.uint8)
    packed.flush()
    return np.lib.format.open_memmap(file, mode="r")


def index_of(folder, count):
    images, texts = torch.randn(count, 512), torch.randn(5 * count, 512)
    paths = [f"images/{i}.jpg" for i in range(count)]
    captions = [f"caption {i}" for i in range(5 * count)]
    owner = torch.arange(count).repeat_interleave(5)
    return SearchIndex.build(images, paths, range(count), texts, captions, owner).save(folder)


def measure(options, work):
    split = pictures_of(work / "pictures", options.images)
    size = sum(path.stat().st_size for path in split.image_paths)
    numbers = itertools.count()
    first = seconds(lambda: _contents(split, work / f"cache{next(numbers)}"))
    line(f"{options.images:,} pictures, hashed", first, size, "when a picture is new or has changed")
    again = seconds(lambda: _contents(split, work / "cache0"))
    line(f"{options.images:,} pictures, known", again, size, "at each opening: the files' stamps alone")
    packed = packed_of(work / "packed.npy", options.images, options.size)
    spent = seconds(lambda: _checksum(packed))
    line(f"{options.images:,} packed at {options.size} px", spent, packed.nbytes, "at each opening: CRC-32")
    for count in (options.images, 20_000):
        folder = index_of(work / f"index{count}", count)
        checksums = read_json(folder / _MANIFEST)["checksums"]
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        whole = seconds(lambda folder=folder: SearchIndex.open(folder))
        check = seconds(lambda folder=folder, checksums=checksums: _check_bytes(folder, checksums))
        line(
            f"index of {count:,} images, opened",
            whole,
            size,
            f"of this, {check:.3f} s for the check: SHA-256",
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--work", type=Path, help="a folder for about 1 GB (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        measure(options, Path(work))


if __name__ == "__main__":
    main()
