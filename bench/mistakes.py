"""The common mistakes of lesson 12 on photographs, each beside the right run with the same seed.

    python bench/mistakes.py FOLDER --run runs/mistakes --json > results/mistakes_photos.json

FOLDER holds captioned photographs as `bench/photos.py data` writes them (6,045 of Flickr8k and COCO to train
on, 1,000 of Flickr8k to measure on). The backbone and the text tower of the preset `photos` are frozen; a
head of 512 hidden units trains on features that are computed once. A run that was stopped goes on with the
same command; `--seeds 2 --epochs 1` tries it. Damage: wrong minus right in recall, with a 95 % interval over
seeds and images (clip475.studies.effects). Captions and pictures of FOLDER are not in the result.
"""

import argparse
import json
import math
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from clip475.core.config import LabConfig
from clip475.core.files import save_tensors
from clip475.data.images import pack_images
from clip475.data.photos import photo_split
from clip475.data.pixels import normalize
from clip475.data.tokens import _pad_tokens, _token_ids, load_tokenizer
from clip475.models.joint import build_model, projection_head
from clip475.models.policies import apply_policy
from clip475.models.text import encode_texts
from clip475.studies.effects import _estimate
from clip475.training.batches import prepare_data
from clip475.training.features import with_features
from clip475.training.loss import info_nce
from clip475.training.steps import embed_images

BATCH, RATE, BLACK, EMA = 250, 1e-3, 0.3, 0.98
QUERIES = ("a dog in the snow", "people play a ball game", "food on a table")
ANIMALS = ("a dog", "a black cat on a sofa", "two birds", "a horse in a field", "an animal in the water")
CLASSES = {"a person": ["a person"], "an animal": ANIMALS, "a vehicle": ["a vehicle"]}
WORDS = {
    "a person": "man woman boy girl person people men women child children player".split(),
    "an animal": "dog dogs cat bird birds horse horses animal puppy".split(),
    "a vehicle": "car cars truck motorcycle bus train boat vehicle".split(),
}


# ── measures: for each picture, how many of its queries find a right answer among the first k ──


def image_to_text(scores, owner, k=1):
    "Hits (N,) of scores (N, M): a picture finds any of its captions."
    found = owner[scores.topk(k, 1).indices]  # (N, k)
    return (found == torch.arange(len(scores))[:, None]).any(1).double()


def text_to_image(scores, owner, k=1):
    "Hits (N,): how many captions of each picture find it."
    found = (scores.T.topk(k, 1).indices == owner[:, None]).any(1).double()
    return torch.zeros(len(scores), dtype=torch.double).index_add_(0, owner, found)


WAYS = {"i2t_R@1": image_to_text, "t2i_R@1": text_to_image}


def compare(right, wrong, queries):
    "Right and wrong hits (seeds, N) with `queries` (N,) each: both rates, and the damage with its interval."
    hits = {"right": torch.stack(right).numpy(), "wrong": torch.stack(wrong).numpy()}
    effect = _estimate({"wrong": 1.0, "right": -1.0}, hits, queries.double().numpy())
    half = effect.half_width()
    rates = {name: round(float(value.mean(0).sum() / queries.sum()), 4) for name, value in hits.items()}
    numbers = {"estimate": effect.estimate, "low": effect.estimate - half, "high": effect.estimate + half}
    return rates | {name: round(value, 4) for name, value in numbers.items()}


# ── one training, with a mistake or without ──


def times_tau(images, texts, logit_scale, ids):
    logits = images @ texts.T * (-logit_scale).exp()
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def without_ids(images, texts, logit_scale, ids):
    return info_nce(images, texts, logit_scale)


def one_caption(rows, captions, generator):
    "One caption of each picture, drawn anew in each step."
    drawn = [captions[row][torch.randint(len(captions[row]), (), generator=generator)] for row in rows]
    return rows, torch.tensor(drawn)


def first_caption(rows, captions, generator):
    return rows, torch.tensor([captions[row][0] for row in rows])


def all_captions(rows, captions, generator):
    "Fifty pictures with all their captions: a batch is as large as the others."
    columns = [(row, column) for row in rows.tolist() for column in captions[row]]
    return tuple(torch.tensor(columns).T)


TRAININGS = {  # what differs from the right run
    "right": {},
    "times τ": {"loss": times_tau},
    "right, all captions": {"choose": all_captions, "pictures": BATCH // 5, "longer": 0.4},
    "own captions as negatives": {
        "choose": all_captions,
        "pictures": BATCH // 5,
        "longer": 0.4,
        "loss": without_ids,
    },
    "black pictures": {"black": BLACK},
    "first caption only": {"choose": first_caption},
    "decay on the scale": {"scale_decay": 0.2},
    "more steps": {"longer": 1.5},
}


class Head(nn.Module):
    "Features (B, width) → unit vectors (B, D), and the logit scale."

    def __init__(self, width, dim):
        super().__init__()
        self.layers = projection_head(width, 512, dim, "batch", 0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, features):
        return F.normalize(self.layers(features), dim=1)


def train_head(
    data,
    seed,
    epochs,
    loss=info_nce,
    choose=one_caption,
    pictures=BATCH,
    black=0.0,
    scale_decay=0.0,
    longer=1,
):
    "Returns the head, one whose weights alone are averaged over steps, one averaged with buffers, and a log."
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    features = data["features"].clone()
    spoilt = torch.rand(len(features), generator=generator) < black
    features[spoilt] = data["black"]
    head = Head(features.shape[1], data["texts"].shape[1])
    averages = [deepcopy(head).requires_grad_(False) for _ in range(2)]
    groups = [
        {"params": head.layers.parameters(), "weight_decay": 0.05},
        {"params": [head.logit_scale], "weight_decay": scale_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    steps = int(longer * epochs) * (len(features) // pictures)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, temperatures = [], []
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < pictures:
            order = torch.randperm(len(features), generator=generator)
        rows, order = order[:pictures], order[pictures:]
        rows, columns = choose(rows, data["captions"], generator)
        different, where = rows.unique(return_inverse=True)
        embeddings = head(features[different])[where]
        value = loss(embeddings, data["texts"][columns], head.logit_scale, rows)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        temperatures.append(float((-head.logit_scale).exp().detach()))
        with torch.no_grad():
            for average, parts in zip(averages, ("parameters", "state_dict"), strict=True):
                update(average, head, parts)
    return head.eval(), [a.eval() for a in averages], {"losses": losses, "temperatures": temperatures}


def update(average, head, parts):
    "One step of an exponential average, over the parameters alone or over the buffers too."
    names = dict(head.named_parameters()) if parts == "parameters" else head.state_dict()
    kept = average.state_dict()
    for name, value in names.items():
        if value.is_floating_point():
            kept[name].lerp_(value.detach(), 1 - EMA)


# ── data ──


def encode_with(tower, captions, tokenizer, read):
    "Unit vectors of captions, read from the tower's raw output by `read`."
    parts = []
    for start in range(0, len(captions), 250):
        ids = _token_ids(captions[start : start + 250], tokenizer, 64)
        with torch.no_grad():
            parts.append(read(tower(**_pad_tokens(ids, tokenizer.pad_token_id))))
    return F.normalize(torch.cat(parts), dim=1)


READINGS = {
    "pooler_output": lambda output: output.pooler_output,
    "position 0": lambda output: output.last_hidden_state[:, 0],
}


def kept_tensors(place, name, make):
    "What `make()` returns, a dict of tensors, from the file of an earlier call if there is one."
    from safetensors.torch import load_file

    file = place / f"{name}.safetensors"
    if not file.is_file():
        save_tensors(file, {key: value.contiguous() for key, value in make().items()})
    return load_file(file)


def drifted_backbone(backbone, pixels, config):
    "The frozen backbone after one pass in training mode over some training pictures."
    moved = deepcopy(backbone).train()
    with torch.no_grad():
        for start in range(0, 2048, 32):
            moved(
                normalize(
                    torch.from_numpy(pixels[start : start + 32].copy()), config.image_mean, config.image_std
                )
            )
    return moved.eval()


def load_data(folder, place):
    config = LabConfig.from_preset("photos", data=folder, val_images=None)
    train, val = prepare_data(config, names=("train", "val"))
    model = build_model(config)
    apply_policy(model, "head-only")
    model.eval()
    backbone, tower = model.image_encoder.backbone, model.text_encoder.tower.text_model.eval()
    tokenizer = load_tokenizer(config.text_model)
    shown = photo_split()
    captions = [[] for _ in range(len(train))]
    for column, row in enumerate(train.split.caption_image.tolist()):
        captions[row].append(column)

    def features(pixels, config=config, encode=backbone):
        return embed_images(model, pixels, config, encode=encode)

    def others():
        imagenet = config.replace(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
        none = config.replace(image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
        moved = drifted_backbone(backbone, train.pixels, config)
        return {
            "black": features(torch.zeros(1, 224, 224, 3, dtype=torch.uint8).numpy())[0],
            "ImageNet's mean": features(val.pixels, imagenet),
            "no normalisation": features(val.pixels, none),
            "drifted": features(val.pixels, encode=moved),
            "shown": features(pack_images(shown, 224, progress=False)),
        }

    def texts():
        found = {}
        for name, read in READINGS.items():
            found[name] = encode_with(tower, val.split.captions, tokenizer, read)
            found[f"queries {name}"] = encode_with(tower, list(QUERIES), tokenizer, read)
        classes = [text for texts in CLASSES.values() for text in texts]
        for name, those in (("queries", QUERIES), ("classes", classes)):
            found[name] = encode_texts(list(those), model.text_encoder, tokenizer)
        return found

    return (
        kept_tensors(place, "others", others)
        | kept_tensors(place, "texts", texts)
        | {
            "features": with_features(train, model, config, train=True).features[0],
            "texts": train.text_embeddings,
            "captions": captions,
            "val": with_features(val, model, config, train=False).features[0],
            "val texts": val.text_embeddings,
            "owner": torch.tensor(val.split.caption_image),
            "val captions": list(val.split.captions),
            "shown ids": shown.image_ids.tolist(),
        }
    )


# ── all trainings, each kept ──


def log_of(losses):
    "The mean loss of each tenth of a training."
    return [round(float(part.mean()), 2) for part in losses.tensor_split(10)]


def trained(place, data, name, seed, epochs):
    "Embeddings of the validation pictures and a log, from the file of an earlier call if there is one."

    def make():
        head, (weights_alone, with_buffers), log = train_head(data, seed, epochs, **TRAININGS[name])
        found = {"val": head(data["val"]).detach(), **{k: torch.tensor(v) for k, v in log.items()}}
        if name != "right":
            return found
        found |= {"average of weights": weights_alone(data["val"]), "average": with_buffers(data["val"])}
        for other in ("ImageNet's mean", "no normalisation", "drifted", "shown"):
            found[other] = head(data[other]).detach()
        return found

    return kept_tensors(place, f"{name.replace(' ', '-').replace(',', '')}-{seed}", make)


# ── the mistakes of measuring, on the right models ──


def labels_of(data):
    "The class of each validation picture that most of its captions agree on; −1 for the others."
    votes = torch.zeros(len(data["val"]), len(WORDS))
    for caption, row in zip(data["val captions"], data["owner"].tolist(), strict=True):
        named = set(caption.lower().replace(".", " ").split())
        votes[row] += torch.tensor([bool(named & set(words)) for words in WORDS.values()]).float()
    captions = data["owner"].bincount()
    clear = (votes > captions[:, None] / 2).sum(1) == 1
    return torch.where(clear, votes.argmax(1), -1)


def class_means(data):
    "The mean embedding of each class's texts, not normalised again."
    sizes = [len(texts) for texts in CLASSES.values()]
    return torch.stack([part.mean(0) for part in data["classes"].split(sizes)])


def measured(data, runs):
    "The damage of each mistake; `runs`: by name, what each seed found."
    texts, owner = data["val texts"], data["owner"]
    captions, ones = owner.bincount(), torch.ones(len(data["val"]))
    queries = {"i2t_R@1": ones, "t2i_R@1": captions}
    scores = [run["val"] @ texts.T for run in runs["right"]]
    hits = {way: [hit(s, owner) for s in scores] for way, hit in WAYS.items()}

    def both(wrong_scores, right=hits, ways=WAYS):
        return {
            way: compare(right[way], [hit(s, owner) for s in wrong_scores], queries[way])
            for way, hit in ways.items()
        }

    def embedded(name, part="val"):
        return [run[part] @ texts.T for run in runs[name]]

    found = {}
    for name in TRAININGS:
        if name not in ("right", "right, all captions", "own captions as negatives"):
            found[name] = both(embedded(name))
    several = {way: [hit(s, owner) for s in embedded("right, all captions")] for way, hit in WAYS.items()}
    found["own captions as negatives"] = both(embedded("own captions as negatives"), several)
    averaged = {way: [hit(s, owner) for s in embedded("right", "average")] for way, hit in WAYS.items()}
    found["average without buffers"] = both(embedded("right", "average of weights"), averaged)
    for name, part in {
        "ImageNet's mean at evaluation": "ImageNet's mean",
        "no normalisation at evaluation": "no normalisation",
        "drifting BatchNorm": "drifted",
    }.items():
        found[name] = both(embedded("right", part))
    search = {"t2i_R@1": text_to_image}
    for name in READINGS:
        typed = [run["val"] @ data[name].T for run in runs["right"]]
        found[f"queries by {name}"] = both(typed, ways=search)

    # the diagonal: one row for each caption, and only its own column counts
    diagonal = []
    for s in scores:
        right_first = (s[owner].argmax(1) == torch.arange(len(owner))).double()
        diagonal.append(torch.zeros(len(s), dtype=torch.double).index_add_(0, owner, right_first) / captions)
    found["the diagonal"] = {"i2t_R@1": compare(hits["i2t_R@1"], diagonal, ones)}
    first = (owner.diff(prepend=torch.tensor([-1])) > 0).nonzero().flatten()
    of_first = [image_to_text(s[:, first], owner[first]) for s in scores]
    found["gallery of first captions"] = {"i2t_R@1": compare(hits["i2t_R@1"], of_first, ones)}
    order = sorted(range(len(owner)), key=lambda j: data["val captions"][j])
    stale = [image_to_text(s, owner[order]) for s in scores]  # the cache has the order of yesterday
    found["stale cache"] = {"i2t_R@1": compare(hits["i2t_R@1"], stale, ones)}

    labels, means = labels_of(data), class_means(data)
    clear = labels >= 0
    given = {
        name: [(run["val"] @ classes.T).argmax(1) for run in runs["right"]]
        for name, classes in (("right", F.normalize(means, dim=1)), ("wrong", means))
    }
    right, wrong = ([(g == labels)[clear].double() for g in given[name]] for name in ("right", "wrong"))
    counts = {name: g[0].bincount(minlength=len(CLASSES)).tolist() for name, g in given.items()}
    found["templates not normalised"] = {
        "accuracy": compare(right, wrong, clear[clear].double()),
        "pictures": int(clear.sum()),
        "labels": labels[clear].bincount(minlength=len(CLASSES)).tolist(),
        "given": counts,
        "norms of the class means": [round(x, 3) for x in means.norm(dim=1).tolist()],
    }
    seeds = [float(h.sum() / captions.sum()) for h in hits["t2i_R@1"]]
    found["another seed"] = {"t2i_R@1 of the right run by seed": [round(x, 4) for x in seeds]}
    return found


def symptoms(data, runs):
    "What a student sees of the first seed: curves, temperatures, cosines, and what a search finds."
    first = {name: found[0] for name, found in runs.items()}
    right = first["right"]
    ids = data["shown ids"]

    def best(queries):
        return [[ids[i] for i in row] for row in (queries @ right["shown"].T).topk(5).indices.tolist()]

    return {
        "losses": {name: log_of(run["losses"]) for name, run in first.items()},
        "steps": {name: len(run["losses"]) for name, run in first.items()},
        "temperature at the end": {
            name: round(float(run["temperatures"][-1]), 4) for name, run in first.items()
        },
        "mean cosine before and after the drift": round(
            float((right["val"] * right["drifted"]).sum(1).mean()), 4
        ),
        "best five of 163 photographs": {
            "queries": list(QUERIES),
            "right": best(data["queries"]),
            **{name: best(data[f"queries {name}"]) for name in READINGS},
        },
        "smallest cosine of 100 captions": {
            name: round(float((t[:500:5] @ t[:500:5].T).min()), 4)
            for name, t in {"right": data["val texts"], **{name: data[name] for name in READINGS}}.items()
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--run", default="runs/mistakes", help="trainings are kept here")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    place = Path(args.run)
    place.mkdir(parents=True, exist_ok=True)
    data = load_data(args.folder, place)
    runs = {name: [] for name in TRAININGS}
    for seed in range(args.seeds):
        for name in TRAININGS:
            runs[name].append(trained(place, data, name, seed, args.epochs))
    result = {
        "command": "python bench/mistakes.py FOLDER --json > results/mistakes_photos.json",
        "data": f"{len(data['captions']):,} photographs to train on, {len(data['val']):,} with "
        f"{len(data['owner']):,} captions to measure on",
        "seeds": args.seeds,
        "epochs": args.epochs,
        "batch": BATCH,
        "share of black pictures": BLACK,
        "mistakes": measured(data, runs),
        "symptoms": symptoms(data, runs),
    }
    if args.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    for name, ways in result["mistakes"].items():
        for way, found in ways.items():
            if isinstance(found, dict) and "low" in found:
                damage, low, high = (100 * found[key] for key in ("estimate", "low", "high"))
                rates = f"{found['right']:.3f} → {found['wrong']:.3f}"
                print(f"{name:32} {way:8} {rates} {damage:+.1f} ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
