#!/usr/bin/env python3
"""How well copies of photographs in two splits are found by their look, and what that costs.

    python bench/near_copies.py --pictures DIR [--pictures DIR …] > results/near_copies.json

`found` is the share of 300 photographs whose changed copy counts as alike. `alike` lists the pairs among all
photographs that count as alike without being copies we made: false alarms, or copies that the data had.
`drawn` is the number of such pairs among drawn scenes. Seconds are those of one thread.
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from clip475.data.images import _LEAST_COSINE, _MOST_BITS, _alike, _looks
from clip475.data.scenes import draw_scene, make_scene

SIZE = 224


def square(image):
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def saved_again(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def without_edge(image, share):
    width, height = image.size
    return image.crop(
        (int(width * share), int(height * share), int(width * (1 - share)), int(height * (1 - share)))
    )


CHANGES = {
    "JPEG of quality 30": lambda image: saved_again(image, 30),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "30 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "2 % cut off each side": lambda image: without_edge(image, 0.02),
    "5 % cut off each side": lambda image: without_edge(image, 0.05),
    "grey": lambda image: image.convert("L"),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, action="append", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = [file for folder in args.pictures for file in sorted(folder.rglob("*.jpg"))]
    packed = np.stack([square(Image.open(file)) for file in files])
    begun = time.perf_counter()
    _looks(packed)
    looked = time.perf_counter()
    pairs = [(i, j) for i, j in _alike(packed, packed) if i < j]
    ended = time.perf_counter()
    some = np.random.default_rng(475).choice(len(files), 300, replace=False)
    originals = [Image.open(files[i]).convert("RGB") for i in some]
    found = {}
    for name, change in CHANGES.items():
        copies = np.stack([square(change(image)) for image in originals])
        alike = {i for i, j in _alike(packed[some], copies) if i == j}
        found[name] = round(len(alike) / len(some), 3)
    scenes = np.stack([np.asarray(draw_scene(make_scene(42, i), 64)) for i in range(2000)])
    result = {
        "command": "python bench/near_copies.py " + " ".join(f"--pictures {p}" for p in args.pictures),
        "photographs": len(files),
        "size": SIZE,
        "most_bits": _MOST_BITS,
        "least_cosine": _LEAST_COSINE,
        "found": found,
        "pairs": len(files) * (len(files) - 1) // 2,
        "alike": [[files[i].name, files[j].name] for i, j in pairs],
        "drawn_pairs": 2000 * 1999 // 2,
        "drawn": sum(i < j for i, j in _alike(scenes, scenes)),
        "seconds_to_look": round(looked - begun, 2),
        "seconds_to_look_twice_and_compare": round(ended - looked, 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
