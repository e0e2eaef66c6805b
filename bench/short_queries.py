"""Short queries such as “a red boat”: python bench/short_queries.py [--run DIR] [--json]

Every colour with every kind, 128 queries, over the validation scenes of the run. A scene counts as right
where it holds things of that colour and kind, in any number. Without --run, the demo's settings are trained
first into a temporary folder (about two minutes). Captions write “a man in red”, never “a red man”: the
queries about people are asked in both ways.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from clip475.app.report import run_lab
from clip475.core.config import LabConfig
from clip475.data.drawings import _COLOURS, _GROUP_OF, _KINDS
from clip475.data.scenes import _a, _columns, load_truth
from clip475.data.tokens import load_tokenizer
from clip475.evaluation.zeroshot import mean_interval
from clip475.models.joint import load_model
from clip475.models.text import encode_texts
from clip475.training.batches import prepare_data
from clip475.training.steps import embed_images

PAIRS = [(colour, kind) for colour in _COLOURS for kind in _KINDS]


def query(colour, kind):
    return _a(f"{colour} {kind}")


def query_as_captions(colour, kind):
    return f"{_a(kind)} in {colour}" if _GROUP_OF[kind] == "people" else query(colour, kind)


def right_images(scenes):
    "Which of N scenes hold things of each colour and kind, (128, N)."
    table = _columns(scenes)
    return np.stack([((table["colour"] == c) & (table["kind"] == k)).any(1) for c, k in PAIRS])


def best_five(scores, right):
    "The share of right images among the best five of each query, (128,); `scores` and `right` (128, N)."
    best = scores.topk(5, dim=1).indices.numpy()
    return np.take_along_axis(right, best, 1).mean(1)


def measure(run):
    model, config = load_model(run)
    (val,) = prepare_data(config, progress=False, names=("val",), run=run)
    truth = load_truth(val.split.root, "val")
    right = right_images([truth[image][0] for image in val.split.image_ids.tolist()])
    images = embed_images(model, val.pixels, config)
    tokenizer = load_tokenizer(config.text_model, config.text_revision)

    def precision_of(write):
        texts = encode_texts([write(*pair) for pair in PAIRS], model.text_encoder, tokenizer)
        return best_five(texts @ images.T, right)

    precision = precision_of(query)
    mean, low, high = mean_interval(precision)

    def by(position):
        names = sorted({pair[position] for pair in PAIRS})
        return {n: round(float(precision[[n == p[position] for p in PAIRS]].mean()), 3) for n in names}

    return {
        "precision@5": round(mean, 4),
        "interval": [round(low, 4), round(high, 4)],
        "queries": len(PAIRS),
        "precision@5, people as in captions": round(float(precision_of(query_as_captions).mean()), 4),
        "images": len(val),
        "base rate": round(float(right.mean()), 4),
        "fewest right images of a query": int(right.sum(1).min()),
        "by kind": by(1),
        "by colour": by(0),
        "trained on": f"{config.train_images:,} scenes, {config.epochs} epochs, {config.image_size} px",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="folder of a run on scenes; left out: train the demo")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object, as results/short_queries.json keeps it"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.run is None:
            run_lab(LabConfig.from_preset("tiny"), Path(folder) / "run", progress=False)
        found = measure(args.run or Path(folder) / "run")
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print("\n".join(f"{name}: {value}" for name, value in found.items()))
