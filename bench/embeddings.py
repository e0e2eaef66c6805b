"""The shared space of the full demo, epoch by epoch: python bench/embeddings.py [--seeds N] [--json FILE]

The demo is trained once for each seed (scenes, first weights and order all change), into a temporary folder.
Before training and after each epoch, pictures that it has not seen are measured in two ways: the space
(modality gap, separability, alignment, uniformity, hubness, neighbour overlap, recall), and the facts that it
has learned (the share of pictures whose true caption beats all captions that are wrong in this fact alone).
FILE is written after each seed, and a seed that stands in it is not trained again.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from clip475.core.config import LabConfig
from clip475.core.files import read_json, write_json
from clip475.data.scenes import _VAL_START, make_scene
from clip475.data.tokens import load_tokenizer
from clip475.evaluation.retrieval import evaluate_retrieval
from clip475.evaluation.space import _keep_embeddings, _uniform_value, space_measures
from clip475.evaluation.zeroshot import _PAIRED, _SINGLE, _alone, _alternatives, _draw_scenes
from clip475.models.text import encode_texts
from clip475.training.batches import prepare_data
from clip475.training.runs import fit
from clip475.training.steps import _model_to_evaluate, embed_images, start_training

SCENES = 500


class Facts:
    "Pictures of unseen scenes, for each fact those that have it, and their captions, the true one first."

    def __init__(self, config, encoder):
        scenes = [make_scene(config.seed, _VAL_START + i) for i in range(SCENES)]
        alone, pairs = [_alone(scene) for scene in scenes], [s for s in scenes if len(s.things) == 2]
        chosen = [*alone, *pairs]
        self.pixels = _draw_scenes(chosen, config.image_size)
        self.choices = {fact: [] for fact in (*_SINGLE, *_PAIRED)}
        for fact, found in self.choices.items():
            for row, scene in enumerate(chosen):
                captions = _alternatives(scene, fact)
                if captions:
                    found.append((row, [caption.text for caption in captions]))
        texts = sorted({text for found in self.choices.values() for _, group in found for text in group})
        self.column = {text: i for i, text in enumerate(texts)}
        self.texts = encode_texts(texts, encoder, load_tokenizer())  # (T, D)

    def known(self, images):
        "The share of pictures whose true caption scores highest, for each fact. A tie counts as lost."
        scores = images @ self.texts.T
        shares = {}
        for fact, found in self.choices.items():
            groups = [scores[row, [self.column[text] for text in texts]] for row, texts in found]
            shares[fact] = sum(bool(group[0] > group[1:].max()) for group in groups) / len(groups)
        return shares

    def described(self):
        "Pictures and chance of each fact."
        return {
            fact: {"pictures": len(found), "chance": round(1 / len(found[0][1]), 4)}
            for fact, found in self.choices.items()
        }


def of_the_space(images, val):
    recall = evaluate_retrieval(images, val.text_embeddings, val.split.caption_image, bootstrap=0)
    recalls = {"recall@1, image→text": recall["i2t"]["R@1"], "recall@1, text→image": recall["t2i"]["R@1"]}
    return space_measures(images, val.text_embeddings, val.split.caption_image) | recalls


def rounded(numbers):
    return {name: round(value, 4) for name, value in numbers.items()}


def measure(config):
    "What is kept of one seed, and its facts."
    train, val = prepare_data(config, progress=False)
    untrained = start_training(config).model.eval()
    facts = Facts(config, untrained.text_encoder)
    known = [facts.known(embed_images(untrained, facts.pixels, config))]
    kept, keep_space = _keep_embeddings(val, config)

    def watch(state):
        keep_space(state)
        known.append(facts.known(embed_images(_model_to_evaluate(state), facts.pixels, config)))

    with tempfile.TemporaryDirectory() as folder:
        fit(config, train, val, Path(folder) / "run", progress=False, watch=watch)
    epochs = {f"epoch {epoch}": rounded(of_the_space(images, val)) for epoch, images in kept}
    learned = {f"epoch {epoch}": rounded(shares) for epoch, shares in enumerate(known)}
    return {"epochs": epochs, "facts": learned}, facts.described()


def measure_all(config, seeds, path):
    result = read_json(path) if path and path.is_file() else {}
    result |= {
        "trained on": f"{config.train_images:,} scenes, {config.epochs} epochs, {config.image_size} px",
        "images": config.val_images,
        "uniformity of an even sphere": round(_uniform_value(config.embedding_dim), 4),
    }
    seeded = result.setdefault("seeds", {})
    for seed in range(config.seed, config.seed + seeds):
        if str(seed) in seeded:
            continue
        seeded[str(seed)], described = measure(config.replace(seed=seed))
        result.setdefault("facts", described)  # of the first seed; the others differ by a few pictures
        if path:
            write_json(path, result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=None, help="training images; the demo's if left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="the file that is written after each seed")
    args = parser.parse_args()
    config = LabConfig.from_preset("tiny", **({"train_images": args.images} if args.images else {}))
    for seed, one in measure_all(config, args.seeds, args.json)["seeds"].items():
        print(f"seed {seed}\n{pd.DataFrame(one['epochs']).round(2)}\n{pd.DataFrame(one['facts']).round(2)}")
