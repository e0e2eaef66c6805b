"""Which side is short on short queries: python bench/short_queries_sides.py [--json FILE] [--epochs 5 20]

Two frozen text encoders: the built-in one, and the same one trained further on captions and short phrases
of other scenes, beside a network that is given the true facts of each scene. Two image sides on each: the
demo's network, which sees pixels, and one that is given the true facts. Each is trained on the captions alone
or with noun phrases such as “a red boat” among them, two for each scene. The image side that sees pixels is
also read without any text: by linear probes on its features, fitted to the true labels of the training
images. An arm that stands in FILE already is not trained again, and the second text encoder is kept in the
cache.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from short_queries import PAIRS, best_five, query, right_images
from torch import nn
from torch.nn import functional as F

from clip475.core.config import LabConfig
from clip475.core.devices import seed_everything
from clip475.core.files import cache_dir, write_json
from clip475.data.drawings import _COLOURS, _KINDS, PLACES
from clip475.data.pixels import normalize
from clip475.data.scenes import _RELATIONS, Scene, _phrase, caption_scene, load_truth, make_scene
from clip475.data.tokens import load_tokenizer, tokenize
from clip475.evaluation.retrieval import evaluate_retrieval
from clip475.evaluation.zeroshot import mean_interval
from clip475.models.joint import DualEncoder, ImageEncoder, _weight_decay_groups, projection_head
from clip475.models.text import encode_texts, load_text_encoder
from clip475.studies.text_tower import _TOWER_SEED, _save_tower
from clip475.training.batches import PreparedSplit, prepare_data
from clip475.training.loss import _clamp_logit_scale_
from clip475.training.steps import embed_images, learning_rate_at, start_training, train_epoch

THING_FACTS = [*_KINDS, *_COLOURS, *PAIRS, 1, 2, 3]
FACTS = [*PLACES, *_RELATIONS, *((place, fact) for place in (0, 1) for fact in THING_FACTS)]
TOWER_FIRST = 1_000_000  # scenes that the built-in text encoder was not trained on
COLUMN = {fact: column for column, fact in enumerate(FACTS)}


def facts_of(scene: Scene) -> torch.Tensor:
    "The truth of a scene as zeros and ones, the thing to the left or above first."
    things, relation = scene.things, scene.relation
    if relation in ("right", "below"):
        things, relation = things[::-1], _RELATIONS[relation]
    facts: list = [scene.place, *([relation] if relation else [])]
    for position, t in enumerate(things):
        facts += [(position, fact) for fact in (t.kind, t.colour, (t.colour, t.kind), t.count)]
    row = torch.zeros(len(FACTS))
    row[[COLUMN[fact] for fact in facts]] = 1
    return row


def scenes_of(split):
    truth = load_truth(split.root, split.name)
    return [truth[image][0] for image in split.image_ids.tolist()]


def with_phrases(train: PreparedSplit, scenes, encode) -> PreparedSplit:
    "Two noun phrases of its things beside the captions of each scene."
    rng = random.Random(475)
    phrases = [[_phrase(thing, rng) for thing in (scene.things * 2)[:2]] for scene in scenes]
    different = sorted({phrase for own in phrases for phrase in own})
    rows = dict(zip(different, encode(different), strict=True))
    captions, texts = [], []
    for row, own in enumerate(phrases):
        first, last = train.split.first_caption[row : row + 2]
        captions += [*train.split.captions[first:last], *own]
        texts += [*train.text_embeddings[first:last], *(rows[phrase] for phrase in own)]
    per_image = np.diff(train.split.first_caption) + 2
    caption_image = np.repeat(np.arange(len(train)), per_image)
    split = replace(train.split, captions=captions, caption_image=caption_image)
    return replace(train, split=split, text_embeddings=torch.stack(texts))


def other_colours(scene: Scene) -> Scene:
    "The scene with the colours of its two things exchanged; with one thing or one colour, the same scene."
    if len(scene.things) < 2:
        return scene
    first, second = scene.things
    things = replace(first, colour=second.colour), replace(second, colour=first.colour)
    return replace(scene, things=things)


def caption_or_phrase(scene: Scene, rng, short=0.3):
    if rng.random() < short:
        return _phrase(rng.choice(scene.things), rng)
    return rng.choice(caption_scene(scene)).text


def tower_batch(step, size, tokenizer, rng):
    "Tokens of `size` texts, and the facts of their scenes and of as many with exchanged colours."
    scenes = [make_scene(_TOWER_SEED, TOWER_FIRST + step * size + i) for i in range(size)]
    tokens = tokenize([caption_or_phrase(s, rng) for s in scenes], tokenizer, padding="longest")
    changed = [changed for scene in scenes if (changed := other_colours(scene)) != scene]
    return tokens, torch.stack([facts_of(scene) for scene in [*scenes, *changed]])


def train_tower(config, steps, size=256):
    "The built-in text encoder trained further beside a network on true facts; returns its folder."
    folder = cache_dir() / f"short_queries_tower_{steps}"
    if (folder / "model.safetensors").exists():
        return folder
    seed_everything(_TOWER_SEED)
    rng, tokenizer = random.Random(_TOWER_SEED), load_tokenizer(config.text_model)
    text = load_text_encoder(config, frozen=False)
    images = ImageEncoder(nn.Identity(), projection_head(len(FACTS), 1024, config.embedding_dim))
    model = DualEncoder(images, text).train()
    groups = _weight_decay_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, config)
        tokens, facts = tower_batch(step, size, tokenizer, rng)
        logits = model.logit_scale.exp() * images(facts) @ model.encode_text(**tokens).T  # (scenes, size)
        own = torch.arange(size)
        loss = (F.cross_entropy(logits[:size], own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _clamp_logit_scale_(model.logit_scale, config.max_logit_scale)
        if step % 20 == 19:
            print(f"  text encoder, step {step + 1}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    seen = torch.ones(len(tokenizer), dtype=torch.bool)
    tokenizer.save_pretrained(folder)
    return _save_tower(model, seen, folder)


def linear_probe(train, labels, val):
    """Scores (128, V) of logistic regressions on features (N, D) and (V, D), with `labels` (N, 128).

    As in Radford et al. 2021, section 3.2; the penalty is chosen on a fifth of the training images."""
    mean, scale = train.mean(0), train.std(0).mean()
    train, val = (train - mean) / scale, (val - mean) / scale

    def fit(features, labels, penalty):
        weights = torch.zeros(features.shape[1], labels.shape[1], requires_grad=True)
        bias = torch.full((labels.shape[1],), -4.0, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights, bias], max_iter=150, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            wrong = F.binary_cross_entropy_with_logits(features @ weights + bias, labels)
            (total := wrong * labels.shape[1] + penalty * weights.pow(2).sum()).backward()
            return total

        optimizer.step(loss)
        return lambda features: (features @ weights + bias).T.detach()

    own = len(train) * 4 // 5
    right = labels[own:].T.bool().numpy()

    def precision(penalty):
        return best_five(fit(train[:own], labels[:own], penalty)(train[own:]), right).mean()

    return fit(train, labels, max((1e-2, 1e-3, 1e-4, 1e-5), key=precision))(val)


@torch.no_grad()
def features_of(model, pixels, config):
    "What the backbone hands to the head, (N, D)."
    backbone = model.image_encoder.backbone.eval()
    chunks = np.array_split(np.arange(len(pixels)), -(-len(pixels) // 250))
    batches = (torch.from_numpy(np.asarray(pixels[rows])) for rows in chunks)
    return torch.cat([backbone(normalize(b, config.image_mean, config.image_std)).float() for b in batches])


def train_image_side(config, train, val):
    "The trained model, and embeddings of the validation images; of facts where the splits have features."

    def see_facts(model):
        model.image_encoder.backbone = nn.Identity()
        model.image_encoder.head = projection_head(len(FACTS), 1024, config.embedding_dim)

    facts = train.features is not None
    state = start_training(config, **({"modify": see_facts} if facts else {}))
    while state.epoch < config.epochs:
        state.metrics.append(train_epoch(state, train, config, progress=False))
        print(f"  epoch {state.epoch}: loss {state.metrics[-1]['train_loss']:.3f}", file=sys.stderr)
    return state.model, embed_images(state.model, val.features[0].numpy() if facts else val.pixels, config)


def measure(config, train, val, right, query_texts, labels):
    "`right` (128, V): the validation scenes that a query asks for; `labels` (N, 128): those of training."
    model, images = train_image_side(config, train, val)
    mean, low, high = mean_interval(best_five(query_texts @ images.T, right))
    recall = evaluate_retrieval(images, val.text_embeddings, val.split.caption_image, ks=(1,))
    found = {
        "precision@5": round(mean, 4),
        "interval": [round(low, 4), round(high, 4)],
        **{f"{way} R@1": round(recall[way]["R@1"], 4) for way in ("i2t", "t2i")},
    }
    if train.features is None:
        features, own = (features_of(model, split.pixels, config) for split in (train, val))
        mean, low, high = mean_interval(best_five(linear_probe(features, labels, own), right))
        found |= {"linear probe": round(mean, 4), "its interval": [round(low, 4), round(high, 4)]}
    return found


BOTH = "captions and phrases"


def arms_of(epochs):
    "Text encoder, image side, texts and epochs of each arm, the cheap ones first."
    for tower in TOWERS:
        yield from ((tower, "true facts", texts, 20) for texts in (BOTH, "captions"))
    for passes in epochs:
        yield from ((tower, "pixels", BOTH, passes) for tower in reversed(TOWERS))


TOWERS = ("built-in", "trained further")


def prepare(config, tower, steps):
    "The splits by their texts, true facts of their scenes, right images, and embeddings of the queries."
    if tower == "trained further":
        config = config.replace(text_model=str(train_tower(config, steps)))
    train, val = prepare_data(config, progress=False, names=("train", "val"))
    encoder, tokenizer = load_text_encoder(config), load_tokenizer(config.text_model)

    def encode(texts):
        return encode_texts(texts, encoder, tokenizer)

    scenes = {split.split.name: scenes_of(split.split) for split in (train, val)}
    texts = {"captions": train, BOTH: with_phrases(train, scenes["train"], encode)}
    facts = {name: torch.stack([facts_of(scene) for scene in own])[None] for name, own in scenes.items()}
    labels = torch.from_numpy(right_images(scenes["train"]).T).float()
    queries = encode([query(*pair) for pair in PAIRS])
    return config, texts, val, facts, (right_images(scenes["val"]), queries, labels)


def main(file, epochs, steps):
    found = json.loads(file.read_text()) if file and file.exists() else {"arms": []}
    done = {(a["text encoder"], a["image side"], a["texts"], a["epochs"]) for a in found["arms"]}
    kept, prepared = None, None
    for arm in arms_of(epochs):
        if arm in done:
            continue
        tower, side, texts, passes = arm
        print(*arm, sep=", ", file=sys.stderr, flush=True)
        if kept != tower:
            kept, prepared = tower, prepare(LabConfig.from_preset("tiny"), tower, steps)
        config, of_texts, val, facts, asked = prepared
        train = of_texts[texts]
        if side == "true facts":
            train, val = replace(train, features=facts["train"]), replace(val, features=facts["val"])
        names = {"text encoder": tower, "image side": side, "texts": texts, "epochs": passes}
        found |= {"queries": len(PAIRS), "images": len(val), "train images": len(train), "tower steps": steps}
        found["arms"].append(names | measure(config.replace(epochs=passes), train, val, *asked))
        print(f"  {found['arms'][-1]}", file=sys.stderr, flush=True)
        if file:
            write_json(file, found)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the arms are kept, one by one")
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 20], help="of the arms on pixels")
    parser.add_argument("--steps", type=int, default=300, help="of the second text encoder, 256 texts each")
    args = parser.parse_args()
    print(json.dumps(main(args.json, args.epochs, args.steps)["arms"], indent=1, ensure_ascii=False))
