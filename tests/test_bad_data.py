"Bad input gives one sentence that names file and entry; no picture ever gets another picture's caption."

import copy
import io
import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.data.captions import (
    CaptionSplit,
    _caption_file,
    _draw,
    _load_splits,
    describe_split,
    load_split,
)
from clip475.data.images import _caption_choice, batches, epoch_order, pack_images
from clip475.data.pixels import _denormalize, _to_rgb, load_image, normalize, resize_square

# a small folder in COCO 2014's layout: the picture of image `id` has its own colour, its captions say the id


def colour_of(id):
    return (id * 37 % 256, id * 91 % 256, id * 151 % 256)


def coco_data(ids=(3, 1, 7, 5), captions=5):
    images = [{"id": i, "file_name": f"{i:06}.jpg"} for i in ids]
    said = [(i, f"caption {k} of image {i}") for i in ids for k in range(captions)]
    return {
        "images": images,
        "annotations": [{"id": 100 + n, "image_id": i, "caption": c} for n, (i, c) in enumerate(said)],
    }


def write_folder(root, data, name="val", on_disk=None):
    root, pictures = Path(root), Path(root) / f"{name}2014"
    for folder in (root / "annotations", pictures):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"captions_{name}2014.json").write_text(
        data if isinstance(data, str) else json.dumps(data)
    )
    for image in data["images"] if on_disk is None else on_disk:
        Image.new("RGB", (24, 16), colour_of(image["id"])).save(pictures / image["file_name"], quality=95)
    return root


def refusal(fn, *args, **kwargs):
    with pytest.raises(LabError) as caught:
        fn(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 600
    return message


def tree(folder):
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(folder).rglob("*"))}


# the good folder


def test_a_good_folder_gives_every_pair_and_no_other(tmp_path, capfd):
    data = coco_data()
    before = tree(write_folder(tmp_path, data))
    split = load_split(tmp_path, "val")
    assert (
        split.image_ids.tolist() == [1, 3, 5, 7]
        and len(split) == 4
        and len(split.captions) == 20
        and split.missing == 0
    )
    for row, id in enumerate(split.image_ids):
        assert split.image_paths[row].name == f"{id:06}.jpg"
        assert split.captions_of(row) == [f"caption {k} of image {id}" for k in range(5)]
    assert tree(tmp_path) == before
    assert capfd.readouterr() == ("", "")


def test_captions_are_stripped_and_five_six_or_seven_are_all_kept(tmp_path):
    data = coco_data((1, 2, 3), 5)
    data["annotations"] += [
        {"id": n, "image_id": i, "caption": f"  more {n}\n"} for n, i in ((900, 2), (901, 3), (902, 3))
    ]
    split = load_split(write_folder(tmp_path, data), "val")
    assert np.bincount(split.caption_image).tolist() == [5, 6, 7]
    assert split.captions_of(1)[-1] == "more 900" and split.captions_of(2)[-2:] == ["more 901", "more 902"]
    table = describe_split(split)
    assert (
        table.loc["val", "images"] == 3
        and table.loc["val", "captions"] == 18
        and table.loc["val", "captions per image (max)"] == 7
    )


def test_the_order_of_the_file_does_not_matter_and_the_place_neither(tmp_path):
    data, shuffled = coco_data(), coco_data()
    random.Random(0).shuffle(shuffled["images"])
    random.Random(1).shuffle(shuffled["annotations"])
    a = load_split(write_folder(tmp_path / "a", data), "val", 2)
    b = load_split(write_folder(tmp_path / "b", shuffled), "val", 2)
    assert a == b and a.fingerprint == b.fingerprint and hash(a) == hash(b)
    assert a != load_split(tmp_path / "a", "val", 3)


def test_fingerprint_changes_with_each_part(tmp_path):
    split = load_split(write_folder(tmp_path, coco_data()), "val")
    parts = dict(
        name=split.name,
        root=split.root,
        image_ids=split.image_ids,
        image_paths=split.image_paths,
        captions=split.captions,
        caption_image=split.caption_image,
    )
    paths = [p.with_name("x" + p.name) for p in split.image_paths]
    owner = split.caption_image.copy()
    owner[5] = 0
    seen = {split.fingerprint}
    for change in (
        dict(name="train"),
        dict(image_ids=split.image_ids + 1),
        dict(image_paths=paths),
        dict(captions=["x"] + split.captions[1:]),
        dict(caption_image=owner),
    ):
        seen.add(CaptionSplit(**{**parts, **change}).fingerprint)
    assert len(seen) == 6
    assert CaptionSplit(**{**parts, "root": Path("elsewhere")}).fingerprint == split.fingerprint


def test_missing_images_are_left_out_and_counted(tmp_path):
    data = coco_data()
    split = load_split(write_folder(tmp_path, data, on_disk=data["images"][:2]), "val")
    assert split.image_ids.tolist() == [1, 3] and split.missing == 2


def test_pictures_that_nobody_listed_are_ignored(tmp_path):
    write_folder(tmp_path, coco_data())
    (tmp_path / "val2014" / "notes.txt").write_text("x")
    Image.new("RGB", (8, 8)).save(tmp_path / "val2014" / "999999.jpg")
    assert len(load_split(tmp_path, "val")) == 4


@given(n=st.integers(1, 60), seed=st.integers(0, 2**40), data=st.data())
def test_a_draw_is_sorted_unique_repeatable_and_grows(n, seed, data):
    count = data.draw(st.integers(1, n))
    rows = _draw(range(n), count, seed)
    assert len(rows) == count and (np.diff(rows) > 0).all() and rows.min() >= 0 and rows.max() < n
    assert (rows == _draw(range(n), count, seed)).all()
    assert (_draw(range(n), None, seed) == np.arange(n)).all()
    if count > 1:
        assert set(_draw(range(n), count - 1, seed)) <= set(rows)


def test_the_seed_decides_the_draw_and_no_row_is_preferred():
    draws = [_draw(range(40), 10, seed) for seed in range(200)]
    assert len({tuple(rows) for rows in draws}) > 190
    often = np.bincount(np.concatenate(draws), minlength=40)
    assert 20 < often.min() and often.max() < 85  # 50 times each, on average


def test_two_splits_share_no_image(tmp_path):
    config = LabConfig.from_preset("tiny", train_images=2, val_images=2)
    write_folder(tmp_path, coco_data((1, 2, 3)), "train")
    write_folder(tmp_path, coco_data((11, 12, 13)), "val")
    train, val = _load_splits(tmp_path, config)
    assert (train.name, val.name, len(train), len(val)) == ("train", "val", 2, 2)
    write_folder(tmp_path, coco_data((1, 2, 3)), "val")
    message = refusal(_load_splits, tmp_path, config.replace(train_images=None, val_images=None))
    assert "image 1 is in both train and val" in message


# bad caption files: each is refused with the file and the entry


def broken(change, *expected, id):
    return pytest.param(change, expected, id=id)


def set_item(part, i, key, value):
    def change(data):
        data[part][i][key] = value

    return change


def drop_item(part, i, key):
    def change(data):
        del data[part][i][key]

    return change


def apply(fn):
    def change(data):
        fn(data)

    return change


BROKEN = [
    broken(apply(lambda d: d.pop("images")), '"images"', id="no images"),
    broken(apply(lambda d: d.pop("annotations")), '"annotations"', id="no annotations"),
    broken(apply(lambda d: d.update(images={"1": 2})), '"images"', id="images not a list"),
    broken(apply(lambda d: d["images"].insert(2, "x.jpg")), 'entry 2 of "images"', id="image not an object"),
    broken(
        apply(lambda d: d["annotations"].insert(3, None)),
        'entry 3 of "annotations"',
        id="annotation not an object",
    ),
    broken(drop_item("images", 1, "id"), 'entry 1 of "images" lacks "id"', id="image lacks id"),
    broken(
        drop_item("images", 1, "file_name"),
        'entry 1 of "images" lacks "file_name"',
        id="image lacks file_name",
    ),
    broken(
        drop_item("annotations", 6, "id"), 'entry 6 of "annotations" lacks "id"', id="annotation lacks id"
    ),
    broken(
        drop_item("annotations", 6, "image_id"),
        'entry 6 of "annotations" lacks "image_id"',
        id="annotation lacks image_id",
    ),
    broken(
        drop_item("annotations", 6, "caption"),
        'entry 6 of "annotations" lacks "caption"',
        id="annotation lacks caption",
    ),
    broken(
        set_item("annotations", 6, "image_id", 42),
        'annotation 106 names image 42, which is not in "images"',
        id="unknown image",
    ),
    broken(
        set_item("annotations", 6, "image_id", "3"), "annotation 106 names image '3'", id="image id as text"
    ),
    broken(
        set_item("annotations", 6, "image_id", [3]), "annotation 106 names image [3]", id="image id as list"
    ),
    broken(
        set_item("annotations", 6, "image_id", True), "annotation 106 names image True", id="image id as bool"
    ),
    broken(
        set_item("annotations", 6, "caption", " \n\t"), "annotation 106 has the caption", id="blank caption"
    ),
    broken(
        set_item("annotations", 6, "caption", None), "annotation 106 has the caption None", id="caption null"
    ),
    broken(
        set_item("annotations", 6, "caption", 7), "annotation 106 has the caption 7", id="caption a number"
    ),
    broken(
        set_item("annotations", 6, "id", 100),
        'entries 0 and 6 of "annotations" both have the id 100',
        id="annotation id twice",
    ),
    broken(
        set_item("images", 2, "id", 3), 'entries 0 and 2 of "images" both have the id 3', id="image id twice"
    ),
    broken(set_item("images", 2, "id", "7"), "entry 2 of \"images\" has the id '7'", id="id as text"),
    broken(set_item("images", 2, "id", 2**64), 'entry 2 of "images" has the id', id="id too large"),
    broken(set_item("images", 2, "id", -7), 'entry 2 of "images" has the id -7', id="id negative"),
    broken(
        set_item("images", 2, "file_name", "000003.jpg"),
        'images 3 and 7 both have the file_name "000003.jpg"',
        id="file_name twice",
    ),
    broken(
        set_item("images", 2, "file_name", "../secret.jpg"),
        "image 7 has the file_name '../secret.jpg'",
        id="file_name climbs out",
    ),
    broken(
        set_item("images", 2, "file_name", "/etc/passwd"),
        "image 7 has the file_name '/etc/passwd'",
        id="file_name absolute",
    ),
    broken(
        set_item("images", 2, "file_name", "..\\a.jpg"),
        "image 7 has the file_name",
        id="file_name with backslash",
    ),
    broken(
        set_item("images", 2, "file_name", ".."), "image 7 has the file_name '..'", id="file_name the parent"
    ),
    broken(set_item("images", 2, "file_name", ""), "image 7 has the file_name ''", id="file_name empty"),
    broken(set_item("images", 2, "file_name", 5), "image 7 has the file_name 5", id="file_name a number"),
    broken(
        apply(lambda d: d.update(annotations=[a for a in d["annotations"] if a["image_id"] != 7])),
        'image 7 ("000007.jpg") has no caption',
        id="image without captions",
    ),
]


@pytest.mark.parametrize("change, expected", BROKEN)
def test_a_broken_caption_file_is_refused(tmp_path, change, expected):
    good = coco_data()
    bad = copy.deepcopy(good)
    change(bad)
    root = write_folder(tmp_path, bad, on_disk=good["images"])
    before = tree(root)
    message = refusal(load_split, root, "val")
    assert str(root / "annotations" / "captions_val2014.json") in message
    for text in expected:
        assert text in message
    assert tree(root) == before


@pytest.mark.parametrize(
    "content", ["", "{", "<html><body>404</body></html>", "[1, 2", '{"images": [}', "\x00\x01"]
)
def test_a_file_that_is_not_json(tmp_path, content):
    root = write_folder(tmp_path, content, on_disk=[])
    assert "captions_val2014.json: this is not JSON" in refusal(load_split, root, "val")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"images"'])
def test_json_that_is_no_caption_file(tmp_path, content):
    root = write_folder(tmp_path, content, on_disk=[])
    assert 'there is no list "images"' in refusal(load_split, root, "val")


def test_what_lies_elsewhere_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(load_split, tmp_path / "nowhere", "val")
    write_folder(tmp_path, coco_data(), "train")
    message = refusal(load_split, tmp_path, "val")
    assert "captions_val2014.json: there is no such file" in message and "captions_train2014.json" in message
    assert "choose one of: train, val" in refusal(load_split, tmp_path, "test")
    assert "nothing" in refusal(_caption_file, (tmp_path / "train2014"), "val")


def test_no_folder_of_pictures(tmp_path):
    data = coco_data()
    root = write_folder(tmp_path, data)
    os.rename(root / "val2014", root / "val")
    assert f"{root / 'val2014'}: there is no such folder" in refusal(load_split, root, "val")
    (root / "val2014").write_text("a file")
    assert f"{root / 'val2014'}: there is no such folder" in refusal(load_split, root, "val")


def test_an_empty_split(tmp_path):
    root = write_folder(tmp_path, coco_data(), on_disk=[])
    message = refusal(load_split, root, "val")
    assert str(root / "val2014") in message and "none of the 4 images" in message
    root = write_folder(tmp_path, {"images": [], "annotations": []})
    assert "none of the 0 images" in refusal(load_split, root, "val")


@pytest.mark.parametrize("count", [5, 10**9])
def test_more_images_than_there_are(tmp_path, count):
    message = refusal(load_split, write_folder(tmp_path, coco_data()), "val", count)
    assert str(count) in message and "at most 4" in message


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3"])
def test_a_count_that_is_none(tmp_path, count):
    assert "are asked for" in refusal(load_split, write_folder(tmp_path, coco_data()), "val", count)


# splits made by hand


def parts(**changes):
    return {
        **dict(
            name="val",
            root=Path("r"),
            image_ids=[4, 9],
            image_paths=[Path("a"), Path("b")],
            captions=["x", "y", "z"],
            caption_image=[0, 0, 1],
        ),
        **changes,
    }


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(image_ids=[], image_paths=[], captions=[], caption_image=[]), "no images"),
        (dict(image_paths=[Path("a")]), "2 image ids for 1 paths"),
        (dict(image_ids=[4, 4]), "same image twice"),
        (dict(captions=["x"]), "1 captions for 3 image rows"),
        (dict(caption_image=[0, 1, 2]), "outside 0…1"),
        (dict(caption_image=[-1, 0, 1]), "outside 0…1"),
        (dict(caption_image=[0, 1, 0]), "not sorted"),
        (dict(caption_image=[0, 0, 0]), "no caption for image 9"),
        (dict(captions=[], caption_image=[]), "no caption for image 4"),
    ],
)
def test_a_split_checks_itself(changes, expected):
    assert expected in refusal(CaptionSplit, **parts(**changes))


def test_select_keeps_pairs_in_any_order(tmp_path):
    split = load_split(write_folder(tmp_path, coco_data(range(1, 9), 3)), "val")
    for rows in ([6, 0, 3], slice(2, 5), np.arange(8) % 2 == 0, [-1]):
        part = split.select(rows)
        for row, id in enumerate(part.image_ids):
            assert part.image_paths[row].name == f"{id:06}.jpg"
            assert part.captions_of(row) == [f"caption {k} of image {id}" for k in range(3)]
    assert split.select(slice(None)) == split
    assert "no images" in refusal(split.select, [])
    assert "same image twice" in refusal(split.select, [1, 1])
    for row in (8, -9):
        with pytest.raises(IndexError):
            split.captions_of(row)


# whatever happens to a folder, the pairs of a split are pairs of its caption file

HARMLESS = ["delete picture", "shuffle images", "shuffle annotations", "extra picture", "more captions"]
HARMFUL = [
    "unknown image",
    "bare image",
    "same file_name",
    "same id",
    "lost field",
    "blank caption",
    "cut file",
]


def damage(root, data, what, rng):
    image, annotation = rng.choice(data["images"]), rng.choice(data["annotations"])
    if what == "delete picture":
        (root / "val2014" / image["file_name"]).unlink(missing_ok=True)
    if what == "shuffle images":
        rng.shuffle(data["images"])
    if what == "shuffle annotations":
        rng.shuffle(data["annotations"])
    if what == "extra picture":
        Image.new("RGB", (8, 8)).save(root / "val2014" / f"extra{rng.random()}.jpg")
    if what == "more captions":
        data["annotations"].append(
            {
                "id": rng.randrange(10**6, 10**9),
                "image_id": image["id"],
                "caption": f" more {rng.random()} of {image['id']} ",
            }
        )
    if what == "unknown image":
        annotation["image_id"] = 10**7
    if what == "bare image":
        data["annotations"][:] = [a for a in data["annotations"] if a["image_id"] != image["id"]] or [
            annotation
        ]
    if what == "same file_name":
        image["file_name"] = rng.choice(data["images"])["file_name"]
    if what == "same id":
        image["id"] = rng.choice(data["images"])["id"]
    if what == "lost field":
        annotation.pop(rng.choice(["id", "image_id", "caption"]), None)
    if what == "blank caption":
        annotation["caption"] = " "


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.sampled_from(HARMLESS + HARMFUL), max_size=6),
    seed=st.integers(0, 10**6),
    count=st.sampled_from([None, 1, 2]),
)
def test_no_damage_ever_mixes_up_pairs(steps, seed, count):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        data = coco_data(rng.sample(range(1, 100), 5), rng.randint(1, 3))
        root = write_folder(root, data)
        for what in steps:
            try:
                damage(root, data, what, rng)
            except KeyError:
                pass  # a second damage to an entry that has lost the field
        text = json.dumps(data)
        if "cut file" in steps:
            text = text[: rng.randrange(len(text))]
        caption_path = root / "annotations" / "captions_val2014.json"
        caption_path.write_text(text)
        on_disk = {p.name for p in (root / "val2014").iterdir()}
        listed = [i for i in data["images"] if i["file_name"] in on_disk]
        try:
            split = load_split(root, "val", count)
        except LabError as error:
            assert str(root) in str(error)
            assert set(steps) & set(HARMFUL) or len(listed) < (count or 1), error
            return
        names = {i["id"]: i["file_name"] for i in data["images"]}
        truth = sorted(
            (names[a["image_id"]], a["caption"].strip())
            for a in data["annotations"]
            if names[a["image_id"]] in {p.name for p in split.image_paths}
        )
        assert (
            sorted(
                (split.image_paths[row].name, caption)
                for row, caption in zip(split.caption_image, split.captions)
            )
            == truth
        )
        assert {p.name for p in split.image_paths} <= on_disk and len(split) == (count or len(listed))
        assert (
            len({a["id"] for a in data["annotations"]}) == len(data["annotations"])
            and "cut file" not in steps
        )


# pictures that do not decode


def jpeg(size=(40, 30), **options):
    b = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(b, "JPEG", **options)
    return b.getvalue()


def huge_png():
    "A 20,000 × 20,000 picture in a few bytes of header."
    b = io.BytesIO()
    Image.new("L", (1, 1)).save(b, "PNG")
    raw = b.getvalue()
    header = raw[12:16] + (20_000).to_bytes(4, "big") * 2 + raw[24:29]
    import zlib

    return raw[:12] + header + zlib.crc32(header).to_bytes(4, "big") + raw[33:]


UNREADABLE = {
    "empty": b"",
    "html": b"<html><body>404 not found</body></html>",
    "noise": bytes(range(256)),
    "cut": jpeg()[:-400],
    "head only": jpeg()[:40],
    "bomb": huge_png(),
    "cut png": None,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_picture_that_does_not_decode(tmp_path, kind):
    path = tmp_path / "000042.jpg"
    content = UNREADABLE[kind]
    if kind == "cut png":
        b = io.BytesIO()
        Image.open(io.BytesIO(jpeg())).save(b, "PNG")
        content = b.getvalue()[:-500]
    path.write_bytes(content)
    message = refusal(load_image, path)
    assert message.startswith(f"{path}: this picture does not decode")


def test_a_folder_or_nothing_instead_of_a_picture(tmp_path):
    assert "it is a folder" in refusal(load_image, tmp_path)
    assert "there is no such file" in refusal(load_image, tmp_path / "x.jpg")


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10**6), progressive=st.booleans())
def test_no_cut_jpeg_passes(cut, progressive):
    whole = jpeg(progressive=progressive)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jpg"
        path.write_bytes(whole[: cut % len(whole)])
        assert str(path) in refusal(load_image, path)


@pytest.mark.parametrize("bad", range(5))
def test_a_bad_picture_stops_packing_and_leaves_nothing(tmp_path, bad):
    split = load_split(write_folder(tmp_path / "coco", coco_data(range(1, 6))), "val")
    split.image_paths[bad].write_bytes(jpeg()[:200])
    before = tree(tmp_path / "coco")
    assert str(split.image_paths[bad]) in refusal(pack_images, split, 32, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == [] and tree(tmp_path / "coco") == before


def test_a_picture_that_vanished_since(tmp_path):
    split = load_split(write_folder(tmp_path / "coco", coco_data()), "val")
    split.image_paths[2].unlink()
    assert str(split.image_paths[2]) in refusal(pack_images, split, 32, tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()


# pictures of every mode


def test_every_mode_becomes_rgb():
    white = {
        "1": 1,
        "L": 255,
        "P": 255,
        "LA": (255, 255),
        "RGB": (255,) * 3,
        "RGBA": (255,) * 4,
        "CMYK": (0,) * 4,
        "I;16": 65535,
        "I": 65535,
    }
    for mode, value in white.items():
        image = Image.new(mode, (6, 4), value)
        if mode == "P":
            image.putpalette([255] * 768)
        rgb = _to_rgb(image)
        assert rgb.mode == "RGB" and rgb.size == (6, 4) and rgb.getpixel((0, 0)) == (255, 255, 255), mode


def test_transparency_lies_over_white():
    assert _to_rgb(Image.new("RGBA", (2, 2), (200, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert _to_rgb(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    half = _to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0))
    assert all(abs(v - 127) <= 1 for v in half)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    grey = np.asarray(load_image(tmp_path / "a.png"))
    assert (grey == np.arange(256, dtype=np.uint8).reshape(16, 16, 1)).all()


def test_values_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    assert "floating-point" in refusal(load_image, tmp_path / "a.tif")
    Image.fromarray(np.full((4, 4), 10**6, dtype=np.int32)).save(tmp_path / "b.tif")
    assert "fixed range" in refusal(load_image, tmp_path / "b.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(tmp_path, orientation):
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste((255, 0, 0), (0, 0, 20, 12))  # red in the top left
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes the stored turn
    stored = upright if turns[orientation] is None else upright.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert (np.asarray(load_image(tmp_path / "a.png")) == np.asarray(upright)).all()


def test_broken_exif_does_not_spoil_a_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(exif=b"Exif\0\0garbage"))
    assert load_image(tmp_path / "a.jpg").size == (40, 30)


# the packed cache


def assert_aligned(split, packed, size):
    assert packed.shape == (len(split), size, size, 3) and packed.dtype == np.uint8
    for row, path in enumerate(split.image_paths):
        assert (packed[row] == resize_square(load_image(path), size)).all()
        assert np.abs(packed[row].mean((0, 1)) - colour_of(int(split.image_ids[row]))).max() < 6


@settings(max_examples=15, deadline=None)
@given(
    ids=st.lists(st.integers(1, 250), min_size=1, max_size=9, unique=True),
    size=st.sampled_from([8, 32]),
    seed=st.integers(0, 99),
)
def test_packed_row_i_is_image_i(ids, size, seed):
    with tempfile.TemporaryDirectory() as folder:
        split = load_split(write_folder(Path(folder) / "coco", coco_data(ids, 1)), "val")
        split = split.select(np.random.default_rng(seed).permutation(len(split)))
        packed = pack_images(split, size, Path(folder) / "cache", progress=False)
        assert_aligned(split, packed, size)


def test_packing_twice_reads_the_first_and_writes_nothing(tmp_path, monkeypatch):
    split = load_split(write_folder(tmp_path / "coco", coco_data()), "val")
    pictures = tree(tmp_path / "coco")
    pack_images(split, 32, tmp_path / "cache", progress=False)
    cache = tree(tmp_path / "cache")
    monkeypatch.setattr("clip475.data.images._read_square", None)
    assert len(pack_images(split, 32, tmp_path / "cache", progress=False)) == 4
    assert tree(tmp_path / "cache") == cache and len(cache) == 2 and tree(tmp_path / "coco") == pictures


def test_whatever_changes_is_packed_anew(tmp_path):
    split = load_split(write_folder(tmp_path / "coco", coco_data()), "val")
    cache = tmp_path / "cache"

    def files():
        return {p.name for p in cache.glob("*.npy")}

    def added(split, size=32):
        before = files()
        assert_aligned(split, pack_images(split, size, cache, progress=False), size)
        return len(files() - before)

    assert added(split) == 1 and added(split) == 0
    assert added(split, 16) == 1
    assert added(split.select([2, 0])) == 1 and added(split.select([0, 2])) == 1
    words = CaptionSplit(
        split.name,
        split.root,
        split.image_ids,
        split.image_paths,
        ["x"] + split.captions[1:],
        split.caption_image,
    )
    assert added(words) == 1
    path = split.image_paths[1]
    Image.new("RGB", (50, 50), colour_of(int(split.image_ids[1]))).save(path)
    assert added(split) == 1 and added(split) == 0


@pytest.mark.parametrize("size_kept", [True, False])
def test_a_replaced_picture_is_noticed_even_at_the_same_size(tmp_path, size_kept):
    split = load_split(write_folder(tmp_path / "coco", coco_data()), "val")
    path = split.image_paths[0]
    old = pack_images(split, 16, tmp_path / "cache", progress=False)[0].copy()
    length = path.stat().st_size
    stamp = path.stat().st_mtime_ns + 10**9
    Image.new("RGB", (24, 16), "white").save(path, quality=95)
    if size_kept:
        path.write_bytes(path.read_bytes().ljust(length, b"\0")[: max(length, path.stat().st_size)])
    os.utime(path, ns=(stamp, stamp))
    new = pack_images(split, 16, tmp_path / "cache", progress=False)[0]
    assert (new == resize_square(load_image(path), 16)).all() and (new != old).any()


@pytest.mark.parametrize(
    "harm", ["no manifest", "other manifest", "broken manifest", "cut array", "other array", "empty array"]
)
def test_a_spoiled_cache_is_packed_anew(tmp_path, harm):
    split = load_split(write_folder(tmp_path / "coco", coco_data()), "val")
    cache = tmp_path / "cache"
    pack_images(split, 32, cache, progress=False)
    [array], [manifest] = cache.glob("*.npy"), cache.glob("*.json")
    if harm == "no manifest":
        manifest.unlink()
    if harm == "other manifest":
        manifest.write_text(manifest.read_text().replace(split.fingerprint, "0" * 16))
    if harm == "broken manifest":
        manifest.write_text("{")
    if harm == "cut array":
        array.write_bytes(array.read_bytes()[:-100])
    if harm == "other array":
        np.save(array, np.zeros((4, 8, 8, 3), np.uint8))
    if harm == "empty array":
        array.write_bytes(b"")
    assert_aligned(split, pack_images(split, 32, cache, progress=False), 32)
    assert len(list(cache.iterdir())) == 2


def test_an_interrupted_packing_leaves_nothing(tmp_path, monkeypatch):
    split = load_split(write_folder(tmp_path / "coco", coco_data(range(1, 30))), "val")

    def interrupt(path, size):
        if path == split.image_paths[20]:
            raise KeyboardInterrupt
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr("clip475.data.images._read_square", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack_images(split, 32, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_pictures_own_folder_is_never_written(tmp_path):
    split = load_split(write_folder(tmp_path, coco_data()), "val")
    for folder in (tmp_path / "val2014", tmp_path / "val2014" / "cache", tmp_path / "x" / ".." / "val2014"):
        assert "only read" in refusal(pack_images, split, 32, folder, progress=False)
    assert len(list((tmp_path / "val2014").iterdir())) == 4


def test_the_default_folder_is_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    split = load_split(write_folder(tmp_path / "coco", coco_data()), "val")
    packed = pack_images(split, 32, progress=False)
    assert not packed.flags.writeable and str(tmp_path / "cache") in str(packed.filename)


def test_a_cache_that_cannot_be_written(tmp_path):
    split = load_split(write_folder(tmp_path / "coco", coco_data()), "val")
    (tmp_path / "cache").write_text("a file in the way")
    assert "cannot be written" in refusal(pack_images, split, 32, tmp_path / "cache", progress=False)


def test_progress_goes_to_stderr(tmp_path, capfd):
    split = load_split(write_folder(tmp_path / "coco", coco_data()), "val")
    pack_images(split, 32, tmp_path / "cache")
    out, err = capfd.readouterr()
    assert out == "" and (os.environ.get("TQDM_DISABLE") or "4/4" in err)


# pixels and batches


def test_normalising_is_undone_for_every_value():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x = normalize(every)
    assert (
        x.shape == (1, 3, 16, 16)
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    assert (_denormalize(x).numpy() == every).all()


def test_normalising_leaves_its_input_alone_and_takes_tensors(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    kept = pixels.copy()
    a, b = normalize(pixels), normalize(torch.from_numpy(pixels))
    assert (pixels == kept).all() and torch.equal(a, b)
    np.save(tmp_path / "a.npy", pixels)
    assert torch.equal(normalize(np.load(tmp_path / "a.npy", mmap_mode="r")), a)


@pytest.mark.parametrize(
    "bad", [np.zeros((1, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 3, 8, 8), np.uint8)]
)
def test_what_is_no_batch_of_pixels_is_refused(bad):
    assert "(B, H, W, 3)" in refusal(normalize, bad)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_each_image_gets_a_caption_of_its_own(counts, seed, epoch):
    owner = np.repeat(np.arange(len(counts)), counts)
    choice = _caption_choice(owner, seed, epoch)
    assert choice.dtype == torch.int64 and (owner[choice.numpy()] == np.arange(len(counts))).all()
    assert torch.equal(choice, _caption_choice(torch.from_numpy(owner), seed, epoch))


def test_over_many_epochs_every_caption_comes_up_equally_often():
    owner = np.repeat(np.arange(300), np.random.default_rng(0).choice([5, 6, 7], 300))
    epochs = 400
    seen = sum(
        torch.bincount(_caption_choice(owner, 42, e), minlength=len(owner)) for e in range(epochs)
    ).numpy()
    expected = epochs / np.bincount(owner)[owner]
    assert seen.min() > 0
    chi2, freedom = ((seen - expected) ** 2 / expected).sum(), len(owner) - 300
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("owner", [[0, 1, 0], [0, 2], [1, 1]])
def test_a_caption_list_that_is_no_splits_is_refused(owner):
    assert "sorted by image row" in refusal(_caption_choice, np.array(owner), 0, 0)


@given(n=st.integers(1, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_an_epoch_sees_every_image_once(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert (
        order.dtype == torch.int64
        and order.sort().values.equal(torch.arange(n))
        and order.equal(epoch_order(n, seed, epoch))
    )


def test_epochs_and_seeds_differ_and_do_not_run_into_each_other():
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert epoch_order(50, 42, np.int64(3)).equal(epoch_order(50, np.int64(42), 3))


@given(n=st.integers(1, 100), size=st.integers(1, 100))
def test_batches_cut_without_loss(n, size):
    order = epoch_order(n, 0, 0)
    assert torch.cat(batches(order, size, drop_last=False)).equal(order)
    if size > n:
        assert "no batch is full" in refusal(batches, order, size)
    else:
        assert [len(b) for b in batches(order, size)] == [size] * (n // size)


def test_a_batch_of_nothing_is_refused():
    assert "at least 1" in refusal(batches, torch.arange(4), 0)
