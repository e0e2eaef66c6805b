"The photographs in the package: their licences are listed, their sizes are true, and they stay small."

import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "clip475" / "photos"
DATA = json.loads((PHOTOS / "captions.json").read_text(encoding="utf-8"))
MAY_BE_PASSED_ON = {
    "Creative Commons Attribution 2.0",
    "Creative Commons Attribution-ShareAlike 2.0",
    "No known copyright restrictions",
}


def test_the_list_of_licences_is_what_the_tool_writes(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import photos

    written = (PHOTOS / "LICENSES.md").read_text(encoding="utf-8")
    assert written == photos.licences_page(DATA)


def test_every_licence_allows_to_pass_the_photograph_on():
    names = {licence["id"]: licence["name"] for licence in DATA["licenses"]}
    assert {names[image["license"]] for image in DATA["images"]} <= MAY_BE_PASSED_ON
    assert all(image["photo_page"].startswith("https://www.flickr.com/") for image in DATA["images"])


def test_sizes_are_true_and_no_file_is_left_over():
    for image in DATA["images"]:
        with Image.open(PHOTOS / "images" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"]), image["file_name"]
            assert max(opened.size) <= 256, image["file_name"]
            assert not opened.getexif(), image["file_name"]
    listed = {image["file_name"] for image in DATA["images"]}
    assert {path.name for path in (PHOTOS / "images").iterdir()} == listed


def test_all_together_stay_below_three_megabytes():
    assert sum(path.stat().st_size for path in PHOTOS.rglob("*") if path.is_file()) < 3e6
