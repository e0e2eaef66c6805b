#!/usr/bin/env python3
"""Real photographs: train the preset `photos`, head alone and tower, compare with random and frozen
backbones, try other pictures, and make the head that ships.

    python bench/photos.py data FOLDER --flickr8k DIR [--coco DIR]   the splits, by links and one list
    python bench/photos.py arm NAME FOLDER --run DIR [--seed N] [--set FIELD=VALUE] [--out FILE]
    python bench/photos.py recall RUN FOLDER --split NAME [--out FILE] [--name TEXT]
    python bench/photos.py ship FOLDER --out DIR [--set FIELD=VALUE]

`data` splits off 1,000 Flickr8k pictures for validation by a hash of their names, and, with `--coco`, adds
COCO pictures: 300 are kept back for a test (`test`), the photographs that come with the lab never train.
`arm` trains one of:
    head     ImageNet weights, frozen; the head on features computed once (the preset itself)
    tower    from the head's run: all but the five lowest blocks train too
    whole    from the head's run: the whole image tower trains
    random   as `head` and then as `whole`, from a random backbone
Results are added to `--out` by name: recalls with chance and Wilson intervals, wall and CPU seconds, device.
"""

import argparse
import csv
import hashlib
import json
import resource
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

TOWER = {
    "cache_features": False,
    "augment": "crop+flip",
    "freeze_batchnorm": True,
    "batch_size": 128,
    "epochs": 9,
    "learning_rate": 5e-4,
    "backbone_rate": 2.0,
    "precision": "auto",
}
ARMS = {
    "head": [{}],
    "tower": [TOWER | {"policy": "last-n", "policy_blocks": 11}],
    "whole": [TOWER | {"policy": "spec"}],
    "random": [
        {"backbone_weights": None},
        TOWER | {"backbone_weights": None, "policy": "spec", "freeze_batchnorm": False},
    ],
}


def by_hash(paths):
    return sorted(paths, key=lambda path: hashlib.sha256(f"475 {Path(path).name}".encode()).hexdigest())


def captioned(root, without=()):
    "File → captions of all pictures on disk, as the library reads them, but for the image ids `without`."
    from clip475.data.layouts import _read_pools

    _, pools = _read_pools(root)
    found = defaultdict(list)
    for pool in pools.values():
        for caption, row in zip(pool.captions, pool.caption_image, strict=True):
            if pool.image_ids[row] not in without:
                found[str(pool.image_paths[row])].append(caption)
    return found


def make_data(args):
    from clip475.data.photos import load_photos

    out = Path(args.folder)
    shutil.rmtree(out, ignore_errors=True)
    (out / "images").mkdir(parents=True)
    rows, counts = [], {}
    flickr = captioned(Path(args.flickr8k).resolve())
    names = by_hash(flickr)
    parts = {"val": names[: args.val], "train": names[args.val + args.test :]}
    if args.test:
        parts["test"] = names[args.val : args.val + args.test]
    everything = dict(flickr)
    if args.coco:
        more = captioned(Path(args.coco).resolve(), {photo.image_id for photo in load_photos()})
        everything |= more
        names = by_hash(more)
        parts["train"] = parts["train"] + names[300:]
        parts["test"] = parts.get("test", []) + names[:300]
    for split, paths in parts.items():
        counts[split] = len(paths)
        for path in paths:
            link = out / "images" / Path(path).name
            link.symlink_to(path)
            rows += [(f"images/{link.name}", caption, split) for caption in everything[path]]
    with open(out / "captions.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerows([("file_name", "caption", "split"), *rows])
    print(json.dumps(counts))


def wilson(share, n):
    "The 95 % interval of a share among n (Wilson 1927), in percent."
    from scipy.stats import binomtest

    interval = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return [round(100 * interval.low, 1), round(100 * interval.high, 1)]


def measure(embeddings, val):
    from clip475.app.report import _recall_columns

    return _recall_columns(embeddings, val)


def recalls(embeddings, split):
    sizes = {"i2t": len(split), "t2i": len(split.split.captions)}
    out = {"images": len(split), "captions": sizes["t2i"]}
    for name, value in measure(embeddings, split).items():
        out[name] = round(100 * value, 1)
        out[f"{name} interval"] = wilson(value, sizes[name[:3]])
    out["chance t2i_R@1"] = round(100 / len(split), 2)
    return out


def prepare(config, names):
    from clip475.training.batches import prepare_data

    return prepare_data(config, names=names)


def device_name():
    import torch

    from clip475.app.report import _cpu_name

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def add_result(file, name, result):
    if not file:
        return
    file = Path(file)
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept[name] = result
    file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def settings(pairs):
    from clip475.app.cli import _setting

    return dict(_setting(f"{name}={value}") for name, value in pairs)


def train_arm(args):
    from clip475.core.config import LabConfig
    from clip475.core.devices import pick_device
    from clip475.training.runs import fit
    from clip475.training.steps import _model_to_evaluate, embed_images

    wall, cpu = time.time(), cpu_seconds()
    start_from = args.start_from
    for number, fields in enumerate(ARMS[args.arm]):
        last = number == len(ARMS[args.arm]) - 1
        run = Path(args.run) if last else Path(f"{args.run}-stage{number + 1}")
        changes = fields | (settings(args.set) if last else {})
        config = LabConfig.from_preset(
            "photos", data=args.folder, val_images=None, seed=args.seed, start_from=start_from, **changes
        )
        shutil.rmtree(run, ignore_errors=True)
        train, val = prepare(config, ("train", "val"))
        state = fit(config, train, val, run, measure=measure)
        start_from = str(run)
    model = _model_to_evaluate(state)
    result = {
        "command": "python bench/photos.py " + " ".join(sys.argv[1:]),
        "fields": {k: v for k, v in config.changes().items() if k not in ("data", "start_from")},
        "train images": len(train),
        **recalls(embed_images(model, val.pixels, config), val),
        "wall seconds": round(time.time() - wall),
        "cpu seconds": round(cpu_seconds() - cpu),
        "device": device_name(),
        "best epoch": state.best,
    }
    if pick_device().type == "cuda":
        import torch

        result["GPU memory GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        result["images/s"] = round(max(row["images_per_second"] for row in state.metrics))
    add_result(args.out, args.name or args.arm, result)
    print(json.dumps(result, ensure_ascii=False))


def measure_run(args):
    import clip475
    from clip475.models.joint import load_model
    from clip475.training.steps import embed_images

    if Path(args.run).is_dir():
        model, config = load_model(args.run)
    else:
        shipped = clip475.load(args.run)
        model, config = shipped.dual_encoder, shipped.config
    config = config.replace(data=args.folder, test_images=None, val_images=None)
    (split,) = prepare(config, (args.split,))
    result = {"command": "python bench/photos.py " + " ".join(sys.argv[1:])}
    result |= recalls(embed_images(model, split.pixels, config), split)
    add_result(args.out, args.name or f"{args.run} on {args.split}", result)
    print(json.dumps(result, ensure_ascii=False))


def ship(args):
    "Train the head on all pictures of the folder, and write it in half precision."
    import torch
    from safetensors import safe_open

    from clip475.core.config import LabConfig
    from clip475.core.files import save_tensors
    from clip475.training.runs import fit

    config = LabConfig.from_preset("photos", data=args.folder, val_images=None, **settings(args.set))
    train, val = prepare(config, ("train", "val"))
    run = Path(args.run)
    shutil.rmtree(run, ignore_errors=True)
    fit(config, train, val, run)
    out = Path(args.out)
    with safe_open(run / "model.safetensors", "pt") as f:
        state = {name: f.get_tensor(name) for name in f.keys()}
        about = f.metadata()
    half = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    save_tensors(out / "model.safetensors", half, about)
    config.replace(data="flickr8k", val_images=1000).save(out / "config.json")
    print(sum(t.numel() * t.element_size() for t in half.values()) / 1e6, "MB", torch.__version__)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="do", required=True)
    data = commands.add_parser("data")
    data.add_argument("folder")
    data.add_argument("--flickr8k", required=True)
    data.add_argument("--coco")
    data.add_argument("--val", type=int, default=1000)
    data.add_argument("--test", type=int, default=0, help="Flickr8k pictures for a third split")
    arm = commands.add_parser("arm")
    arm.add_argument("arm", choices=list(ARMS))
    arm.add_argument("folder")
    arm.add_argument("--start-from")
    recall = commands.add_parser("recall")
    recall.add_argument("run")
    recall.add_argument("folder")
    recall.add_argument("--split", default="val")
    shipping = commands.add_parser("ship")
    shipping.add_argument("folder")
    for command in (arm, shipping):
        command.add_argument("--run", required=True)
        command.add_argument(
            "--set", action="append", default=[], type=lambda text: tuple(text.split("=", 1))
        )
    for command in (arm, recall, shipping):
        command.add_argument("--out")
    for command in (arm, recall):
        command.add_argument("--name")
    arm.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    {"data": make_data, "arm": train_arm, "recall": measure_run, "ship": ship}[args.do](args)


if __name__ == "__main__":
    main()
