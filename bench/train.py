"""How fast a training step is, beside other ways to do the same work: images/s and ratios.

python bench/train.py [--json] [--batch 16] [--rounds 4] [--threads 2] [--size 224]

All sides train a ResNet50 at 224 × 224 on the same photographs-sized JPEGs (640 × 480, drawn here) with
the same batch size, in turns, step by step, so that whatever else the machine does hits all of them.
Each number is the median step.
(a) loop:      PIL per image in a DataLoader, fp32, the 63M text tower in every step on captions padded to 77
(b) cached:    the same with cached text embeddings
(c) open_clip: open_clip_torch's model, loss and transforms with timm's resnet50, text tower locked, its
  bf16 where we use bf16
(d) step alone: our model's forward and backward on one batch that is there already, normalised; no
  optimizer, no data
The DataLoader works in the main process: on two cores, worker processes would take from the arithmetic what
they add. Without open_clip_torch, (c) is left out.
"""

import argparse
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

from clip475.core.config import CLIP_MEAN, CLIP_STD, LabConfig
from clip475.core.devices import autocast_dtype, pick_device, seed_everything
from clip475.data.images import pack_images
from clip475.data.pixels import normalize
from clip475.data.scenes import caption_scene, draw_scene, make_scene
from clip475.models.joint import ImageEncoder, build_backbone, projection_head
from clip475.training.batches import PreparedSplit, epoch_batches
from clip475.training.distributed import ProcessGroup
from clip475.training.loss import info_nce
from clip475.training.steps import _set_training_mode, start_training, train_step

# Three passes (forward, and backward for inputs and weights) of ResNet50's 4.09 GMACs at 224 × 224
# (He et al. 2015, table 1: 3.8 without the projections).
GFLOP_PER_IMAGE = 3 * 2 * 4.09


def make_pictures(folder, count):
    "A folder in COCO's layout with `count` JPEGs of 640 × 480 and five captions each."
    pictures, images, annotations = folder / "train2014", [], []
    pictures.mkdir()
    (folder / "annotations").mkdir()
    for i in range(count):
        scene, name = make_scene(475, i), f"COCO_train2014_{i + 1:012d}.jpg"
        grain = np.random.default_rng(i).normal(
            0, 12, (480, 640, 3)
        )  # photographs have texture, and its decoding costs
        Image.fromarray(
            np.clip(np.asarray(draw_scene(scene, 640).crop((0, 80, 640, 560)), float) + grain, 0, 255).astype(
                np.uint8
            )
        ).save(pictures / name, quality=90)
        images.append({"id": i + 1, "file_name": name})
        annotations += [
            {"id": 5 * i + j, "image_id": i + 1, "caption": c.text}
            for j, c in enumerate(caption_scene(scene))
        ]
    (folder / "annotations" / "captions_train2014.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    return folder


def text_tower(device):
    "CLIP ViT-B/32's text tower, with random weights: the arithmetic is the same."
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig()).to(device).eval().requires_grad_(False)


class Pictures(torch.utils.data.Dataset):
    """As public solutions read pictures: PIL, resize, ToTensor, Normalize, one at a time; and the first
    tokens of a caption."""

    def __init__(self, split, transform, tokens):
        self.split, self.transform, self.tokens = split, transform, tokens

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        return (
            self.transform(Image.open(self.split.image_paths[i]).convert("RGB")),
            self.tokens[self.split.first_caption[i]],
            i,
        )


def forever(make):
    while True:
        yield from make()


def loop_side(split, tokens, cached, config, device, with_text):
    "(a) and (b): steps of the loop that public solutions use."
    seed_everything(0)
    transform = transforms.Compose(
        [
            transforms.Resize((config.image_size, config.image_size)),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    loader = torch.utils.data.DataLoader(
        Pictures(split, transform, tokens), config.batch_size, shuffle=True, drop_last=True
    )
    backbone, width = build_backbone("resnet50")
    model, scale = (
        ImageEncoder(backbone, projection_head(width, 2048, 512)).to(device).train(),
        torch.nn.Parameter(torch.tensor(2.66, device=device)),
    )
    optimizer, tower = (
        torch.optim.AdamW([*model.parameters(), scale], lr=3e-4),
        text_tower(device) if with_text else None,
    )
    for pixels, ids, rows in forever(lambda: loader):
        if tower is None:
            texts = cached[rows].to(device)
        else:
            with torch.no_grad():
                texts = F.normalize(tower(input_ids=ids.to(device)).text_embeds, dim=-1)
        optimizer.zero_grad()
        info_nce(model(pixels.to(device)), texts, scale).backward()
        optimizer.step()
        yield


def open_clip_side(split, config, device):
    "(c): open_clip_torch's own parts, put together as its training does."
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    seed_everything(0)
    model = CustomTextCLIP(
        512,
        CLIPVisionCfg(
            timm_model_name="resnet50",
            timm_model_pretrained=False,
            timm_pool="",
            timm_proj="linear",
            image_size=config.image_size,
        ),
        CLIPTextCfg(context_length=77, vocab_size=49408, width=512, heads=8, layers=12),
    ).to(device)
    model.lock_text_tower(unlocked_layers=0)
    transform = open_clip.image_transform(config.image_size, is_train=False, resize_mode="squash")
    tokens = open_clip.tokenize(list(split.captions))
    loader = torch.utils.data.DataLoader(
        Pictures(split, transform, tokens), config.batch_size, shuffle=True, drop_last=True
    )
    loss_of, optimizer, dtype = (
        open_clip.ClipLoss(),
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4),
        autocast_dtype(config, device),
    )
    model.train()
    for pixels, ids, _ in forever(lambda: loader):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            images, texts, scale = model(pixels.to(device), ids.to(device))[:3]
            loss = loss_of(images, texts, scale)
        loss.backward()
        optimizer.step()
        yield


def our_side(train, config, process_group):
    state = start_training(config, process_group)
    _set_training_mode(state.model, config)
    for pixels, texts, rows, text_rows in forever(lambda: epoch_batches(train, config, 0, process_group)):
        train_step(state, pixels, texts, rows, 3e-4, config, text_rows)
        yield


def bare_side(train, config, process_group):
    "(d): the same forward and backward on one resident batch, nothing else."
    state, dtype = start_training(config, process_group), autocast_dtype(config, process_group.device)
    _set_training_mode(state.model, config)
    rows = torch.arange(config.batch_size)
    pixels, texts = (
        normalize(torch.from_numpy(np.array(train.pixels[: config.batch_size]))).to(process_group.device),
        train.text_embeddings[train.split.first_caption[: config.batch_size]].to(process_group.device),
    )
    while True:
        state.model.zero_grad(set_to_none=True)
        with torch.autocast(process_group.device.type, dtype=dtype, enabled=dtype != torch.float32):
            embeddings = state.encode(pixels)
        info_nce(embeddings, texts, state.model.logit_scale, rows).backward()
        yield


def matrix_rate(dtype, device):
    "TFLOP/s of square matrix products, ten at a time on a GPU, the best of six."
    size, times = (8192, 10) if device.type == "cuda" else (2048, 1)
    a, b, best = (
        torch.randn(size, size, dtype=dtype, device=device),
        torch.randn(size, size, dtype=dtype, device=device),
        float("inf"),
    )
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(times):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return times * 2 * size**3 / best / 1e12


def in_turns(sides, rounds, device):
    "Median seconds of a step of each side; the first step of each is not counted."
    times = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            next(side)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
    return {name: median(t) for name, t in times.items()}


def shapes_of_the_specification(batch, size, **fields):
    "The configuration of the preset `coco` that needs no file: random weights, the built-in tokenizer."
    return LabConfig.from_preset(
        "coco",
        data="scenes",
        text_model="builtin",
        text_revision=None,
        backbone_weights=None,
        batch_size=batch,
        image_size=size,
        **fields,
    )


def measure(batch, rounds, size=224):
    from clip475.data.captions import load_split
    from clip475.data.tokens import load_tokenizer, tokenize

    device = pick_device()
    process_group = ProcessGroup(device=device)
    config = shapes_of_the_specification(batch, size)
    with TemporaryDirectory() as folder:
        split = load_split(make_pictures(Path(folder), max(2 * batch, 64)), "train")
        tokens = tokenize(split.captions, load_tokenizer())["input_ids"]
        cached = F.normalize(torch.randn(len(split.captions), 512), dim=-1)
        train = PreparedSplit(
            split, pack_images(split, size, folder=Path(folder) / "packed", progress=False), cached
        )
        sides = {
            "ours": our_side(train, config, process_group),
            "step alone": bare_side(train, config, process_group),
            "loop": loop_side(split, tokens, cached, config, device, True),
            "cached": loop_side(split, tokens, cached, config, device, False),
        }
        if find_spec("open_clip"):
            sides["open_clip"] = open_clip_side(split, config, device)
        seconds = in_turns(sides, rounds, device)
        peak_memory = None
        if device.type == "cuda":  # ours alone
            sides.clear()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            alone = our_side(train, config, process_group)
            for _ in range(2):
                next(alone)
            peak_memory = torch.cuda.max_memory_allocated()
    rate, dtype = batch / seconds["ours"], autocast_dtype(config, device)
    peak = matrix_rate(dtype, device)
    result = {
        "device": f"{device.type}, {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device),
        "precision": str(dtype).removeprefix("torch."),
        "batch": batch,
        "rounds": rounds,
        "images_per_second": {name: round(batch / s, 2) for name, s in seconds.items()},
        "ours against": {
            name: round(seconds[name] / seconds["ours"], 3)
            for name in ("loop", "cached", "open_clip")
            if name in seconds
        },
        "ours against the step alone": round(seconds["step alone"] / seconds["ours"], 3),
        "matrix TFLOP/s": round(peak, 2),
        "share of the matrix rate": round(rate * GFLOP_PER_IMAGE * (size / 224) ** 2 / 1e3 / peak, 3),
        "10 epochs of 16,000 images, minutes": round(160_000 / rate / 60, 1),
        "torch": torch.__version__,
    }
    if peak_memory:
        result["peak memory, GB"] = round(peak_memory / 1e9, 2)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--size", type=int, default=224, help="pixels; another size is for a quick try")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(args.batch, args.rounds, args.size)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
