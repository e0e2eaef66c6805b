#!/usr/bin/env python3
"""Packing pictures and reading them back, beside decoding them anew for each epoch: time per core, and
memory.

    python bench/images.py [--pictures DIR] [--count 128] [--rows 4000] [--memory 20000] [--size 224] [--json]

The other side is what public solutions do for each picture of each epoch: PIL decode, torchvision's
Resize, ToTensor, Normalize. Both sides run in turns in one process that is held to one core and one
thread; times are CPU time, so that other programs do not count (waiting for the disk does not either),
and the best of several rounds counts. The pictures are made up, 640×480, with detail like a
photograph's (about 140 kB each, COCO's have 160 on average); `--pictures` takes real ones.

- pack: `pack_images`, everything included: decode, squash, checksum, journal, write, fsync, manifest, open.
- epoch: batches of 256 random rows out of the packed file as training reads them, uint8 → uint8; and once
  more with `normalize`.
- memory: the peak of a process that packs so many pictures (4 in 5 as train, the rest as val) on all cores.
  They are links to
  64 different files, each decoded as often as it is linked.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def make_pictures(folder, count, side=(640, 480)):
    "Pictures with as much detail at each scale as photographs have, saved at quality 95."
    import numpy as np
    from PIL import Image

    for i in range(count):
        rng, picture = np.random.default_rng(i), np.zeros((side[1], side[0], 3), np.float32)
        for octave in range(1, 10):
            grey, colour = (
                rng.normal(0, 1, (max(2, side[1] * 2**octave // 640), 2**octave, c)).astype(np.float32)
                for c in (1, 3)
            )
            for c in range(3):
                picture[..., c] += (
                    34
                    * 0.75**octave
                    * np.asarray(
                        Image.fromarray(1.6 * grey[..., 0] + 0.5 * colour[..., c]).resize(
                            side, Image.Resampling.BICUBIC
                        )
                    )
                    * 2
                )
        Image.fromarray((picture + 120).clip(0, 255).astype(np.uint8)).save(
            folder / f"{i:06}.jpg", quality=95
        )


def as_split(paths, name="train"):
    import numpy as np

    from clip475.data.captions import CaptionSplit

    return CaptionSplit(
        name,
        paths[0].parent,
        np.arange(len(paths)),
        list(paths),
        ["a picture"] * len(paths),
        np.arange(len(paths)),
    )


def usual(size):
    "What public solutions do with a picture."
    from PIL import Image
    from torchvision import transforms

    from clip475.core.config import CLIP_MEAN, CLIP_STD

    transform = transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
    )
    return lambda path: transform(Image.open(path).convert("RGB"))


def rounds(times, **ways):
    "The least CPU time that each way took, in turns."
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(times):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    return best


def speed(options):
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import numpy as np
    import torch

    import clip475.data.images as images

    torch.set_num_threads(1)
    images._cores = lambda: 1
    paths, decode, cache = (
        sorted(Path(options.pictures).glob("*.jpg"))[: options.count],
        usual(options.size),
        Path(options.work) / "cache",
    )
    split, order = as_split(paths), torch.randperm(options.rows, generator=torch.Generator().manual_seed(0))
    pack = rounds(
        3,
        usual=lambda: [decode(p) for p in paths],
        packed=lambda: images.pack_images(split, options.size, cache, progress=False, rebuild=True),
    )
    many = np.lib.format.open_memmap(
        cache / "many.npy", mode="w+", dtype=np.uint8, shape=(options.rows, options.size, options.size, 3)
    )
    few = images.pack_images(split, options.size, cache, progress=False)
    for i in range(0, options.rows, len(few)):
        many[i : i + len(few)] = few[: len(many[i : i + len(few)])]
    many.flush()
    packed, batches = np.load(cache / "many.npy", mmap_mode="r"), images.batches(order, 256)
    seen = sum(len(b) for b in batches)
    read = rounds(
        5,
        gathered=lambda: [packed[rows] for rows in batches],
        normalised=lambda: [images.normalize(torch.from_numpy(packed[rows])) for rows in batches],
    )
    ms = {
        "usual": 1e3 * pack["usual"] / len(paths),
        "pack": 1e3 * pack["packed"] / len(paths),
        "gather": 1e3 * read["gathered"] / seen,
        "gather_normalize": 1e3 * read["normalised"] / seen,
    }
    return {
        "pictures": len(paths),
        "mean_kb": round(sum(p.stat().st_size for p in paths) / len(paths) / 1e3),
        "size": options.size,
        "ms_per_image": {k: round(v, 4) for k, v in ms.items()},
        "pack_ratio": round(ms["usual"] / ms["pack"], 2),
        "epoch_ratio": round(ms["usual"] / ms["gather"], 1),
        "epoch_normalised_ratio": round(ms["usual"] / ms["gather_normalize"], 1),
    }


def peak_mb():
    "The most memory this process ever held."
    try:
        return (
            next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
            / 1024
        )
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory(options):
    import torch

    from clip475.data.images import pack_images

    torch.set_num_threads(1)
    files, folder = sorted(Path(options.pictures).glob("*.jpg"))[:64], Path(options.work) / "links"
    folder.mkdir()
    paths = [folder / f"{i:06}.jpg" for i in range(options.memory)]
    for i, path in enumerate(paths):
        path.symlink_to(files[i % len(files)].resolve())
    before, start, cut = peak_mb(), time.perf_counter(), len(paths) * 4 // 5
    packed = [
        pack_images(as_split(some, name), options.size, Path(options.work) / "cache2", progress=False)
        for name, some in (("train", paths[:cut]), ("val", paths[cut:]))
    ]
    return {
        "images": options.memory,
        "size": options.size,
        "packed_mb": round(sum(p.nbytes for p in packed) / 1e6),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": round(peak_mb()),
        "before_mb": round(before),
    }


PARTS = {"speed": speed, "memory": memory}


def measure(arguments=()):
    "Both parts, each in a process of its own: a dict of what they found."
    with tempfile.TemporaryDirectory() as work:
        options = parse(arguments)
        pictures = options.pictures or f"{work}/pictures"
        if not options.pictures:
            Path(pictures).mkdir(), make_pictures(Path(pictures), options.count)
        found = {}
        for part in PARTS:
            Path(work, part).mkdir()
            command = [
                sys.executable,
                __file__,
                *arguments,
                "--pictures",
                str(pictures),
                "--part",
                part,
                "--work",
                f"{work}/{part}",
            ]
            found[part] = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            )
        return found


def rows(found):
    "(work, against, ratio or value, aim) for the table."
    s, m = found["speed"], found["memory"]
    ms = s["ms_per_image"]
    usual = f"PIL decode + Resize + ToTensor + Normalize ({ms['usual']:.2f} ms)"
    return [
        (
            f"packing 640×480 JPEGs of {s['mean_kb']} kB at {s['size']} px ({ms['pack']:.2f} ms an image, "
            "per core)",
            usual,
            f"{s['pack_ratio']:.2f}",
            "≥ 1.8",
        ),
        (
            f"an epoch's images from the packed cache, random rows, uint8 ({ms['gather']:.4f} ms)",
            usual,
            f"{s['epoch_ratio']:.0f}",
            "≥ 100",
        ),
        (
            f"the same, normalised to float32 ({ms['gather_normalize']:.3f} ms)",
            usual,
            f"{s['epoch_normalised_ratio']:.0f}",
            "–",
        ),
        (
            f"peak memory while packing {m['images']:,} images ({m['packed_mb']:,} MB, {m['seconds']:.0f} s "
            "on all cores)",
            "–",
            f"{m['peak_mb']:,} MB",
            "< 2,000 MB",
        ),
    ]


def table(lines):
    return "\n".join(
        [
            "| work | against | ratio | aim |",
            "| --- | --- | ---: | ---: |",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"count": 128, "rows": 4000, "memory": 20_000, "size": 224}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pictures", help="a folder of *.jpg to take in place of made-up ones")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    if options.part:
        print(json.dumps(PARTS[options.part](options)))
    else:
        found = measure([a for a in sys.argv[1:] if a != "--json"])
        print(json.dumps(found) if options.json else table(rows(found)))
