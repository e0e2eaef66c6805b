#!/usr/bin/env python3
"""Step 1 beside what public solutions do: pictures (bench/images.py) and captions (bench/captions.py), as
one table.

    python bench/data.py [--memory 20000] [--json]

Both sides of each row run in one process with one thread; every part has a process of its own, so that
one's memory is not another's. What exactly is measured stands in the two files.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CALL = "import sys, json; sys.path.insert(0, sys.argv[1]); import {0}; print(json.dumps({0}.measure({1})))"


def found_by(name, arguments=""):
    "What `measure` of the bench `name` finds, in a fresh process."
    done = subprocess.run(
        [sys.executable, "-c", CALL.format(name, arguments), str(HERE)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"bench/{name}.py failed; run it alone to see more")
    return json.loads(done.stdout.splitlines()[-1])


def caption_rows(found):
    """(work, against, ratio, aim) of each way to encode captions; the first one is what the others stand
    against."""
    (usual, first), *ways = found["encoding"]["ways"].items()
    against = f"{usual} ({first['captions_per_cpu_second']} a CPU second)"
    return [
        (
            f"encoding captions, {name} ({way['captions_per_cpu_second']} a CPU second)",
            against,
            str(way["ratio"]),
            "≥ 10" if "bf16" in name else "≥ 5",
        )
        for name, way in ways
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, default=20_000, help="images of the memory test")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    found = {"images": found_by("images", ["--memory", str(options.memory)])}
    if (HERE / "captions.py").is_file():
        found["captions"] = found_by("captions")
    if options.json:
        return print(json.dumps(found))
    sys.path.insert(0, str(HERE))
    import images

    print(
        images.table(
            images.rows(found["images"]) + (caption_rows(found["captions"]) if "captions" in found else [])
        )
    )


if __name__ == "__main__":
    main()
