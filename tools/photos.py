"""The photographs of the package:  python tools/photos.py FOLDER

FOLDER holds images/ and captions.json: 163 COCO photographs (at most 384 px) whose licences allow
redistribution, with all their captions, and each photograph's licence and page on Flickr.
This writes to clip475/photos/:

- images/        each photograph at most 256 px wide and high, as JPEG of quality 85, without metadata
- captions.json  the same captions in COCO's layout; `width` and `height` are those of the smaller images
- LICENSES.md    every photograph with its licence and page, and the licence of the captions

The photographs come from the COCO data set (https://cocodataset.org). The captions are the COCO Consortium's,
CC BY 4.0. The same folder gives the same captions.json and LICENSES.md.
"""

import json
import sys
from pathlib import Path

from PIL import Image

TARGET = Path(__file__).resolve().parents[1] / "clip475" / "photos"
LONG_SIDE = 256
QUALITY = 85
DESCRIPTION = (
    "163 COCO photographs whose licence allows redistribution, scaled down to at most 256 px; "
    "captions: COCO Consortium, CC BY 4.0"
)
HEAD = """# Licences of the photographs and captions in this folder

The {count} photographs come from the COCO data set (<https://cocodataset.org>), which took them from Flickr.
**They were changed:** those that were larger were scaled down to {side} px, and all were saved again as JPEG.
Nothing was cut off or painted over. `tools/photos.py` made the images and wrote this file.

- Each photograph keeps the licence that its photographer chose. The table names it and links the page of the
  photograph, which names the photographer.
- The changed version of a photograph under a ShareAlike licence, which is the one in this folder, stays under
  that same licence.
- The captions in `captions.json` are the COCO Consortium's. Their texts were not changed. Licence:
  [Creative Commons Attribution 4.0](https://creativecommons.org/licenses/by/4.0/legalcode).

Photographs of each licence:
{counts}

| photograph | licence | page of the photograph |
| --- | --- | --- |
"""


def shrink(source, target):
    "Write the photograph in `source` to `target`, scaled down; returns its new width and height."
    with Image.open(source) as image:
        small = image.convert("RGB")
    small.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    small.save(target, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    return small.size


def licences_page(data):
    "The text of LICENSES.md."
    licences = {licence["id"]: licence for licence in data["licenses"]}
    names = [licences[image["license"]]["name"] for image in data["images"]]
    counts = "\n".join(f"- {names.count(name)}: {name}" for name in sorted(set(names)))
    rows = []
    for image in data["images"]:
        licence = licences[image["license"]]
        page = image["photo_page"]
        rows.append(f"| `{image['file_name']}` | [{licence['name']}]({licence['url']}) | <{page}> |\n")
    head = HEAD.format(count=len(rows), side=LONG_SIDE, counts=counts)
    return head + "".join(rows)


def main(folder):
    data = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    (TARGET / "images").mkdir(parents=True, exist_ok=True)
    for image in data["images"]:
        name = image["file_name"]
        image["width"], image["height"] = shrink(folder / "images" / name, TARGET / "images" / name)
    data["info"] = {"description": DESCRIPTION}
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    (TARGET / "captions.json").write_text(text, encoding="utf-8")
    (TARGET / "LICENSES.md").write_text(licences_page(data), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
