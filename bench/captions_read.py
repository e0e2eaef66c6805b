"""Seconds to read, check and index COCO's whole val caption file: python bench/captions_read.py [--json]
[FOLDER]

FOLDER is in COCO 2014's layout (default: $CLIP475_COCO, else ../shared/data/coco2014). One process,
best of three, the file warm in the page cache. "parse" is json alone and "pycocotools" its own reader
without any check: what the checks cost is the difference.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from time import perf_counter

from pycocotools.coco import COCO

from clip475.data.captions import _caption_file, _listed_split, _read_captions, load_split

DEFAULT = os.environ.get("CLIP475_COCO") or Path(__file__).parents[1].parent / "shared" / "data" / "coco2014"


def best(work, times=3):
    seconds = []
    for _ in range(times):
        start = perf_counter()
        result = work()
        seconds.append(perf_counter() - start)
    return min(seconds), result


def plain(file):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(file))


def measure(root=DEFAULT):
    file = _caption_file(root, "val")
    parse, data = best(lambda: json.loads(file.read_text(encoding="utf-8")))
    theirs, _ = best(lambda: plain(file))
    ours, coco = best(lambda: _read_captions(file))
    rows, split = best(lambda: _listed_split(coco, root, "val"))
    disk, there = best(lambda: load_split(root, "val"))
    return {
        "captions": len(split.captions),
        "images": len(split),
        "images_on_disk": len(there),
        "megabytes": round(file.stat().st_size / 1e6, 1),
        "parse_s": round(parse, 2),
        "pycocotools_s": round(theirs, 2),
        "read_checked_indexed_s": round(ours, 2),
        "to_rows_s": round(rows, 2),
        "load_split_s": round(disk, 2),
        "total_s": round(ours + rows, 2),
    }


if __name__ == "__main__":
    folders = [a for a in sys.argv[1:] if not a.startswith("-")]
    found = measure(*folders)
    print(
        json.dumps(found)
        if "--json" in sys.argv
        else "\n".join(f"{k.replace('_', ' '):28} {v:>12,}" for k, v in found.items())
    )
