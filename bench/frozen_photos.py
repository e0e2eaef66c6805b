"""The freezing study on photographs: arms with the towers of the preset `photos`, from equal starts.

    python bench/frozen_photos.py FOLDER --run runs/photographs --json > results/frozen_photos.json

FOLDER holds captioned photographs with three splits (Flickr8k, or a captions.csv with a column `split`). A
run that was stopped goes on with the same command; what is finished stands in RUN/frozen.json at any time.
With `--so-far`, nothing is trained and the arms that are finished with all seeds are printed. `--arms` takes
some arms only, such as the three that most claims compare: spec all head-only.
"""

import argparse
import json
from pathlib import Path

import torch

from clip475.core.files import read_json
from clip475.studies.photographs import _PHOTO_ARMS, _photo_experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--run", default="runs/photographs")
    parser.add_argument("--json", action="store_true", help="the whole result, instead of a line")
    parser.add_argument("--so-far", action="store_true")
    parser.add_argument("--arms", nargs="*", default=_PHOTO_ARMS, help="these arms only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = Path(args.run) / "frozen.json"
    if args.so_far:
        found = read_json(kept)
        seeds = set(found["scale"]["seeds"])
        arms = {r["arm"] for r in found["results"]}
        done = {a for a in arms if seeds == {r["seed"] for r in found["results"] if r["arm"] == a}}
        found["results"] = [r for r in found["results"] if r["arm"] in done]
        found["tuning"] = [t for t in found["tuning"] if t["arm"] in done]
    else:
        found = _photo_experiment(args.folder, args.run, resume=True, arms=args.arms)
    found["run"] = Path(found["run"]).name
    runs = [(r["arm"], r["seed"]) for r in found["results"]]
    print(
        json.dumps(found, indent=1) if args.json else f"{len(runs)} runs are finished, the last is {runs[-1]}"
    )


if __name__ == "__main__":
    main()
