"""The shared space of the full demo, epoch by epoch: python bench/embeddings.py [--images N] [--json]

The demo's settings are trained into a temporary folder (about two minutes), and after each epoch the
images that it has not seen are measured against their captions: modality gap, separability, alignment,
uniformity, hubness, neighbour overlap, recall.
"""

import argparse
import json
import tempfile
from pathlib import Path

import pandas as pd

from clip475.core.config import LabConfig
from clip475.evaluation.retrieval import evaluate_retrieval
from clip475.evaluation.space import _keep_embeddings, _uniform_value, space_measures
from clip475.training.batches import prepare_data
from clip475.training.runs import fit


def measured(images, val):
    recall = evaluate_retrieval(images, val.text_embeddings, val.split.caption_image, bootstrap=0)
    numbers = space_measures(images, val.text_embeddings, val.split.caption_image)
    return {
        k: round(v, 4)
        for k, v in (
            numbers
            | {
                f"recall@1, {way}": recall[key]["R@1"]
                for way, key in (("image→text", "i2t"), ("text→image", "t2i"))
            }
        ).items()
    }


def measure(config):
    train, val = prepare_data(config, progress=False)
    kept, watch = _keep_embeddings(val, config)
    with tempfile.TemporaryDirectory() as folder:
        fit(config, train, val, Path(folder) / "run", progress=False, watch=watch)
    return {
        "trained on": f"{config.train_images:,} scenes, {config.epochs} epochs, {config.image_size} px",
        "images": len(val),
        "captions": len(val.split.captions),
        "uniformity of an even sphere": round(_uniform_value(config.embedding_dim), 4),
        "epochs": {f"epoch {epoch}": measured(images, val) for epoch, images in kept},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=None, help="training images; the demo's if left out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(LabConfig.from_preset("tiny", **({"train_images": args.images} if args.images else {})))
    print(
        json.dumps(result, indent=2, ensure_ascii=False)
        if args.json
        else pd.DataFrame(result["epochs"]).round(3)
    )
