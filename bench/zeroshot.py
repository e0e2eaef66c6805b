"""What the full demo knows of unseen scenes, and how well words sort them: python bench/zeroshot.py [--run
DIR] [--scenes N] [--json]

Without --run, the demo's settings are trained first into a temporary folder (about two minutes). Accuracy
of eight facts beside chance, with 95 % intervals; four groups under several prompts; sixteen kinds with
their recall; calibration under the trained temperature.
"""

import argparse
import json
import math
import tempfile
import warnings
from pathlib import Path

import torch

from clip475.app.report import run_lab
from clip475.core.config import LabConfig
from clip475.data.drawings import _GROUP_OF, _GROUPS, _KINDS
from clip475.data.scenes import _GROUP_WORDS, _VAL_START, make_scene
from clip475.data.tokens import load_tokenizer
from clip475.evaluation.zeroshot import (
    TEMPLATES,
    _alone,
    _draw_scenes,
    _per_class_recall,
    _scene_probes,
    calibration,
    class_embeddings,
    classify,
    confusion_matrix,
    mean_interval,
)
from clip475.models.joint import load_model
from clip475.training.steps import embed_images


def a(word):
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def rounded(values):
    return [round(float(v), 4) for v in values]


def measure(run, count):
    model, config = load_model(run)
    tokenizer = load_tokenizer(config.text_model, config.text_revision)
    scenes = [_alone(make_scene(config.seed, _VAL_START + i)) for i in range(count)]
    images = embed_images(model, _draw_scenes(scenes, config.image_size), config)
    groups, kinds = list(_GROUPS), torch.tensor([_KINDS.index(s.things[0].kind) for s in scenes])
    truth = torch.tensor([groups.index(_GROUP_OF[_KINDS[k]]) for k in kinds])

    def classes(names, templates):
        return class_embeddings(names, model.text_encoder, tokenizer, templates, config.context_length)

    def answers(c):
        return tuple(x[:, 0] for x in classify(images, c, model.logit_scale, 1))

    by_kind = classes([a(k) for k in _KINDS], TEMPLATES)
    words = [a(_GROUP_WORDS[g]) for g in groups]
    prompts = {
        "the bare name": classes(words, ["{}"]),
        "a photo of …": classes(words, ["a photo of {}"]),
        "a picture of …": classes(words, ["a picture of {}"]),
        "the lab's templates": classes(words, TEMPLATES),
        "its kinds, averaged": torch.stack(
            [
                torch.nn.functional.normalize(by_kind[[_GROUP_OF[k] == g for k in _KINDS]].mean(0), dim=-1)
                for g in groups
            ]
        ),
    }
    hits = {name: (answers(c)[1] == truth).numpy() for name, c in prompts.items()}
    confidence, guess = answers(by_kind)
    curve, error = calibration(confidence, guess == kinds)
    probes = _scene_probes(
        lambda pixels: embed_images(model, pixels, config),
        model.text_encoder,
        tokenizer,
        count,
        config.seed,
        config.image_size,
        config.context_length,
    )
    return {
        "trained on": f"{config.train_images:,} scenes, {config.epochs} epochs, {config.image_size} px",
        "temperature": round(math.exp(-model.logit_scale.item()), 4),
        "scenes": count,
        "facts": {
            fact: {k: round(v, 4) for k, v in row.items()} for fact, row in probes.to_dict("index").items()
        },
        "four groups, accuracy and interval": {name: rounded(mean_interval(h)) for name, h in hits.items()},
        "four groups, difference to the bare name": {
            name: rounded(mean_interval(h, hits["the bare name"])) for name, h in hits.items()
        },
        "sixteen kinds, accuracy and interval": rounded(mean_interval(guess == kinds)),
        "recall of each kind": dict(
            zip(_KINDS, rounded(_per_class_recall(confusion_matrix(kinds, guess, len(_KINDS)))))
        ),
        "calibration": {
            "error": round(error, 4),
            "curve": [{k: round(float(v), 4) for k, v in row.items()} for row in curve.to_dict("records")],
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="folder of a run on scenes; left out: train the demo")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object, as results/zeroshot.json keeps it"
    )
    args = parser.parse_args()
    warnings.simplefilter(
        "ignore"
    )  # "photo" is a word that the built-in tower never saw: that is the point of the row
    with tempfile.TemporaryDirectory() as folder:
        if args.run is None:
            run_lab(LabConfig.from_preset("tiny"), Path(folder) / "run", progress=False)
        found = measure(args.run or Path(folder) / "run", args.scenes)
    print(
        json.dumps(found, indent=1, ensure_ascii=False)
        if args.json
        else "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in found.items())
    )
