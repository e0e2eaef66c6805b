#!/usr/bin/env python3
"""Four searches among the 163 photographs that come with the lab, drawn by a rule: two right, two wrong.

    python bench/photo_search.py --json > results/photo_search.json   the searches, all captions' recall
    python bench/photo_search.py --figure docs/photo_search.jpg   the README's picture

Every photograph is looked for by its shortest caption. A search is right if the photograph comes first, and
wrong if it is not among the first five. Of both kinds the two whose captions have the lowest SHA-256 are
shown. The model, `photos`, was never trained on these photographs.
"""

import argparse
import hashlib
import json


def rank_all(model, photos):
    "Each photograph's shortest caption; and for it the rows of all from best to worst, similarity and rank."
    import torch

    captions = [min(photo.captions, key=lambda text: (len(text), text)) for photo in photos]
    images = model.encode_image([photo.path for photo in photos])
    similarity = model.encode_text(captions) @ images.T  # (163, 163)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    ranks = 1 + (order == torch.arange(len(photos))[:, None]).int().argmax(1)
    return captions, order, similarity, ranks


def drawn(captions, ranks, each=2):
    "The rows of `each` right and `each` wrong searches, by the rule above."
    by_lot = sorted(range(len(captions)), key=lambda row: hashlib.sha256(captions[row].encode()).digest())
    right = [row for row in by_lot if ranks[row] == 1]
    wrong = [row for row in by_lot if ranks[row] > 5]
    return right[:each] + wrong[:each]


def facts(model, photos):
    "What is kept: the four searches, and recalls of all captions with 95 % intervals (Wilson)."
    from scipy.stats import binomtest

    captions, order, similarity, ranks = rank_all(model, photos)
    searches = [
        {
            "query": captions[row],
            "rank of its photograph": int(ranks[row]),
            "found": [photos[at].image_id for at in order[row, :5]],
            "scores": [round(similarity[row, at].item(), 3) for at in order[row, :5]],
        }
        for row in drawn(captions, ranks)
    ]
    out = {"command": "python bench/photo_search.py --json", "photographs": len(photos), "searches": searches}
    for k in (1, 5, 10):
        hits = int((ranks <= k).sum())
        low, high = binomtest(hits, len(photos)).proportion_ci(method="wilson")
        out[f"t2i_R@{k}"] = round(100 * hits / len(photos), 1)
        out[f"t2i_R@{k} interval"] = [round(100 * low, 1), round(100 * high, 1)]
        out[f"chance t2i_R@{k}"] = round(100 * k / len(photos), 1)
    return out


def figure(model, photos):
    "A row for each search: the five nearest photographs, and last the one meant if it is not among them."
    from clip475.core.figures import plot_gallery
    from clip475.data.pixels import load_image

    captions, order, similarity, ranks = rank_all(model, photos)
    rows = []
    for row in drawn(captions, ranks):
        found = order[row, :5].tolist()
        found += [row] * (row not in found)
        pictures = [load_image(photos[at].path) for at in found]
        rows.append((captions[row], pictures, [at == row for at in found], similarity[row, found].tolist()))
    return plot_gallery(rows)


def main():
    import clip475
    from clip475.data.photos import load_photos

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the searches and recalls as JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw the four searches into this file")
    args = parser.parse_args()
    model, photos = clip475.load("photos"), load_photos()
    if args.figure:
        figure(model, photos).savefig(args.figure, dpi=110, pil_kwargs={"quality": 88})
    if args.json or not args.figure:
        print(json.dumps(facts(model, photos), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
