"""What the rules of mistakes find on real photographs: python bench/failures.py --data DIR [--size 12]
[--json]

DIR holds COCO 2014 or a part of it. Captions are bags of words (TF-IDF, 256 dimensions of latent
semantic analysis, fitted on train and val together). Two models of the pictures: a linear map of
`--size` × `--size` pixels, fitted on train; and, beyond what any training can hope for, each picture at
the mean of its own captions. Both are measured on val.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from clip475.core.figures import plot_gallery, save_figure
from clip475.data.captions import load_split
from clip475.data.pixels import load_image, resize_square
from clip475.evaluation.mistakes import _RULES, mistake_numbers
from clip475.evaluation.retrieval import caption_means, fit_linear_map
from clip475.searching.index import SearchIndex


def bags_of_words(captions):
    return torch.from_numpy(
        TruncatedSVD(256, random_state=475).fit_transform(TfidfVectorizer().fit_transform(captions))
    ).float()


def thumbnails(split, size):
    return torch.stack(
        [torch.from_numpy(resize_square(load_image(p), size)).flatten() for p in split.image_paths]
    ).float()


def measure(data, size, figures=None):
    train, val = load_split(data, "train"), load_split(data, "val")
    train_texts, val_texts = bags_of_words([*train.captions, *val.captions]).split(
        [len(train.captions), len(val.captions)]
    )
    linear = fit_linear_map(
        thumbnails(train, size), caption_means(train_texts, train.caption_image, len(train)), l2=1e-2
    )
    models = {
        f"{size}×{size} pixels": linear(thumbnails(val, size)),
        "means of captions": caption_means(val_texts, val.caption_image, len(val)),
    }
    found = {}
    for name, images in models.items():
        index = SearchIndex.build(
            images, val.image_paths, val.image_ids, val_texts, val.captions, val.caption_image
        )
        found[name] = {"numbers": {k: round(v, 4) for k, v in mistake_numbers(index).items()}}
        for rule, (_, find) in _RULES.items() if figures else ():
            if rows := find(index):
                save_figure(plot_gallery(rows), Path(figures) / f"{name.split()[0]} {rule}.png")
    return {"train_images": len(train), "images": len(val), "captions": len(val.captions), "models": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder in COCO's layout")
    parser.add_argument("--size", type=int, default=12)
    parser.add_argument("--figures", metavar="DIR", help="draw the galleries into this folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.data, args.size, args.figures)
    print(
        json.dumps(result, indent=2, ensure_ascii=False)
        if args.json
        else pd.DataFrame({k: v["numbers"] for k, v in result["models"].items()})
    )
