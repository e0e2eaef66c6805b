"""Training straight from tar shards (`stream=true`) beside training from packed pictures.

    python bench/stream.py --json > results/stream.json

Drawn scenes as JPEG files of 256 px lie in shards of 256, as img2dataset writes them, with a caption each.
One process on one core trains the same model from them in both ways, in turns: epoch 1 streamed and packed,
epoch 2 streamed and packed, and that again with new weights in each round. `cpu` is by the processor seconds
of the process, which other work on the machine changes little; `wall` is by the clock, which it does change.
`reading` is the same batches without a model. The shards have just been written, so the system may hold them
in memory: a slow disk or a network drive adds its own time to streaming. Photographs of this size are larger
files than drawn scenes, and take longer to decode. The 64 validation pictures are packed in both ways.
"""

import argparse
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

SHAPES = {"64 px": (64, 64, 1024), "224 px": (224, 32, 256)}  # pixels, images in a step, training images
VAL, IN_A_SHARD, SIDE = 64, 256, 256
WAYS = ("streamed", "packed")


def write_shards(root, images):
    "Captioned JPEG files of drawn scenes in `root`, in tar shards."
    from clip475.data.captions import load_split
    from clip475.data.scenes import write_scenes

    with TemporaryDirectory() as drawn:
        scenes = Path(drawn) / "scenes"
        write_scenes(scenes, train=images, val=2, size=SIDE, progress=False)
        split = load_split(scenes, "train")
        root.mkdir()
        for start in range(0, images, IN_A_SHARD):
            with tarfile.open(root / f"{start // IN_A_SHARD:05}.tar", "w") as tar:
                for row in range(start, min(start + IN_A_SHARD, images)):
                    picture = split.image_paths[row].read_bytes()
                    caption = split.captions_of(row)[0].encode()
                    for ending, data in (("jpg", picture), ("txt", caption)):
                        info = tarfile.TarInfo(f"{row:06}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))


def megabytes(folder):
    "What lies in `folder`, in MB."
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 1)


def timed(call, *arguments, **options):
    "(what `call` returns, processor seconds, seconds of the clock)."
    cpu, wall = process_time(), perf_counter()
    result = call(*arguments, **options)
    return result, process_time() - cpu, perf_counter() - wall


def measure_shape(root, caches, shape, rounds):
    "Both ways at one shape: seconds before the first step, bytes kept, images/s of each epoch."
    from clip475.core.config import LabConfig
    from clip475.training.batches import _pack_splits, epoch_batches, prepare_data
    from clip475.training.distributed import ProcessGroup
    from clip475.training.steps import start_training, train_epoch

    size, batch_size, images = shape
    alone = ProcessGroup()
    base = LabConfig.from_preset(
        "tiny",
        data=str(root),
        image_size=size,
        batch_size=batch_size,
        train_images=images,
        val_images=VAL,
        epochs=2,
    )
    configs = {way: base.replace(stream=way == "streamed") for way in WAYS}
    found, data = {}, {}
    for way, config in configs.items():
        cache = caches / f"{way}-{size}"
        os.environ["CLIP475_CACHE"] = str(cache)
        _, cpu, wall = timed(_pack_splits, root, config, ("train", "val"), False, False, None)
        found[way] = {
            "before the first step": {"cpu seconds": round(cpu, 2), "wall seconds": round(wall, 2)},
            "kept on disk beside the shards (MB)": megabytes(cache),
            "reading": {"cpu": [], "wall": []},
            "epochs": [{"cpu": [], "wall": []} for _ in range(base.epochs)],
        }
        data[way], _ = prepare_data(config, progress=False)

    def note(place, cpu, wall):
        seen = len(data["packed"]) // batch_size * batch_size
        place["cpu"].append(round(seen / cpu, 1))
        place["wall"].append(round(seen / wall, 1))

    def read(way, epoch):
        for _ in epoch_batches(data[way], configs[way], epoch, alone):
            pass

    for number in range(rounds):
        states = {way: start_training(configs[way].replace(seed=number)) for way in WAYS}
        for epoch in range(base.epochs):
            for way, state in states.items():
                row, *seconds = timed(train_epoch, state, data[way], configs[way], progress=False)
                state.metrics.append(row)
                note(found[way]["epochs"][epoch], *seconds)
                note(found[way]["reading"], *timed(read, way, epoch)[1:])
    losses = [[row["train_loss"] for row in state.metrics] for state in states.values()]
    if losses[0] != losses[1]:
        sys.exit(f"the two ways trained differently: losses {losses}")
    ratios = {}
    for kind in ("cpu", "wall"):
        for epoch in range(base.epochs):
            pairs = zip(*(found[way]["epochs"][epoch][kind] for way in WAYS), strict=True)
            ratios[f"epoch {epoch + 1}, {kind}"] = round(median(one / other for one, other in pairs), 2)
    return {"images": images, "batch_size": batch_size, "streamed to packed": ratios, **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # one core, also for what decodes and packs in threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    from clip475.app.report import _cpu_name

    torch.set_num_threads(1)
    with TemporaryDirectory() as place:
        root = Path(place) / "shards"
        os.environ["CLIP475_CACHE"] = str(Path(place) / "first")
        write_shards(root, max(images for *_, images in SHAPES.values()) + VAL)
        found = {
            "command": " ".join(["python bench/stream.py", *sys.argv[1:]]),
            "machine": f"one core of {_cpu_name()}, beside other work",
            "pictures": f"drawn scenes, JPEG, {SIDE} px",
            "shards (MB)": megabytes(root),
        }
        for name, shape in SHAPES.items():
            found[name] = measure_shape(root, Path(place) / "caches", shape, args.rounds)
    if args.json:
        return print(json.dumps(found, indent=1))
    for name in SHAPES:
        print(name, found[name]["streamed to packed"])


if __name__ == "__main__":
    main()
