#!/usr/bin/env python3
"""What freezing the text tower saves at the specification's full shapes: bytes, seconds, and the largest
batch that fits 15 GB.

    python bench/frozen_memory.py [--batch 8] [--repeats 3] [--memory 15] [--threads N] [--json]

ResNet50 at 224 × 224 and the 63M text tower at 77 tokens, random weights, float32, AdamW. Four ways to
handle the text: cached (looked up; the tower is not in memory), encoded (frozen, run in every step),
trained (77 tokens), trained on 16 (trimmed to them). `fixed`: weights, buffers, gradients and optimizer
state. `per_pair`: what autograd keeps for one more pair. The largest batch is worked out from batches
of 2 and 4, and checked by a third count at that batch itself, on the meta device: shapes without
numbers. `peak`: growth of resident memory in one step of `--batch` pairs, beside `counted`, what
autograd keeps in it.
"""

import argparse
import json
import platform

TOKENS = {"cached": 0, "encoded": 77, "trained": 77, "trained on 16": 16}


def build(way, device="cpu"):
    "Model and optimizer as a step of `way` needs them."
    import torch

    from clip475.core.config import LabConfig
    from clip475.models.joint import build_model, parameter_groups
    from clip475.models.policies import apply_policy

    config = LabConfig.from_preset("coco")
    torch.manual_seed(475)
    with torch.device(device):
        model = build_model(config, pretrained=False).train()
    apply_policy(model, "all" if way.startswith("trained") else "spec")
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=1e-5)
    return model.to(memory_format=torch.channels_last) if device == "cpu" else model, optimizer


def loss_of(model, way, batch, device="cpu"):
    "A function that computes the loss of `batch` random pairs."
    import torch
    import torch.nn.functional as F

    pixels = torch.randn(batch, 3, 224, 224, device=device)
    texts = F.normalize(torch.randn(batch, 512, device=device), dim=-1)
    ids = torch.randint(1, 49_000, (batch, TOKENS[way] or 1), device=device)
    right = torch.arange(batch, device=device)

    def loss():  # InfoNCE, written out: the lab's own asks for the device's autocast, and "meta" has none
        logits = (
            model.logit_scale.exp()
            * model.encode_image(pixels)
            @ (texts if way == "cached" else model.encode_text(ids)).T
        )
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    return loss


def fixed_bytes(model, optimizer, way):
    "Bytes between steps, after one step has made gradients and optimizer state."
    from clip475.training.meters import _resting_bytes, _tensor_bytes

    rest = _resting_bytes(model, optimizer)
    if way == "cached":
        rest["weights"] -= _tensor_bytes(model.text_encoder.parameters())
    return rest


def kept(model, way, batch, device="cpu"):
    from clip475.training.meters import activation_bytes

    return activation_bytes(loss_of(model, way, batch, device), model)


def measure(way, options):
    from clip475.training.meters import _largest_batch, _median_seconds, _step_parts, peak_bytes

    model, optimizer = build(way)
    loss = loss_of(model, way, options.batch)
    parts = _step_parts(loss, optimizer)
    seconds = _median_seconds(parts, repeats=options.repeats)
    rest = fixed_bytes(model, optimizer, way)
    peak = peak_bytes(lambda: [part() for part in parts.values()])
    shapes, _ = build(way, "meta")

    def count(batch):
        return kept(model, way, batch) if batch <= 4 else kept(shapes, way, batch, "meta")

    fit = _largest_batch(count, options.memory * 1e9, fixed=sum(rest.values()))
    total = sum(seconds.values())
    return {
        "fixed": rest,
        "per_pair": fit["bytes_per_item"],
        "seconds": seconds,
        "pairs_per_second": options.batch / total,
        "largest_batch": fit["batch"],
        "predicted": fit["predicted"],
        "measured_there": fit["measured"],
        "peak": peak,
        "counted": kept(model, way, options.batch),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=15.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    ways = {way: measure(way, options) for way in TOKENS}
    result = {
        "batch": options.batch,
        "memory_gb": options.memory,
        "machine": {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "ways": ways,
    }
    if options.json:
        return print(json.dumps(result, indent=2))
    for way, r in ways.items():
        print(
            f"{way:15} fixed {sum(r['fixed'].values()) / 1e6:6.0f} MB, {r['per_pair'] / 1e6:6.1f} MB a pair, "
            f"batch of {r['largest_batch']} in {options.memory:g} GB, {r['pairs_per_second']:.1f} pairs/s, "
            f"peak {r['peak'] / 1e6:.0f} MB (kept {r['counted'] / 1e6:.0f})"
        )


if __name__ == "__main__":
    main()
