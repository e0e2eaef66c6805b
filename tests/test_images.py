"Pictures of every kind, packing that survives kills and bad files, checked caches, and batches."

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

import clip475.data.images as images
from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.data.captions import CaptionSplit
from clip475.data.images import (
    _BadImages,
    _caption_choice,
    _caption_choices,
    _open_packed,
    _read_square,
    pack_images,
)
from clip475.data.pixels import (
    _augmentation_grid,
    _boxes,
    _crop,
    _packed_size,
    augment,
    load_image,
    normalize,
    preprocess,
    resize_square,
)

torch.set_num_threads(1)


def refusal(fn, *args, **kwargs):
    with pytest.raises(LabError) as caught:
        fn(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 700
    return message


def colour_of(id):
    return (id * 37 % 256, id * 91 % 256, id * 151 % 256)


def _make_split(folder, ids, name="train", make=True):
    "A split of plain pictures whose colour tells their id, without a caption file."
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{id:06}.png" for id in ids]
    if make:
        [Image.new("RGB", (12, 8), colour_of(id)).save(path) for id, path in zip(ids, paths)]
    return CaptionSplit(
        name, folder, np.array(ids), paths, [f"caption of {id}" for id in ids], np.arange(len(ids))
    )


def assert_right(packed, split, size=8):
    assert packed.shape == (len(split), size, size, 3)
    for row, id in enumerate(split.image_ids.tolist()):
        assert (packed[row] == colour_of(id)).all(), id


# ── preprocess ──


def test_preprocess_gives_what_packing_and_normalising_give(tmp_path):
    paths = []
    for i, size in enumerate([(640, 480), (300, 500), (96, 96), (50, 20)]):
        noise = np.random.default_rng(i).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{i}.jpg")
        Image.fromarray(noise).resize(size).save(paths[-1])
    expected = normalize(np.stack([_read_square(path, 224) for path in paths]))
    assert torch.equal(preprocess(paths), expected) and expected.shape == (4, 3, 224, 224)
    assert torch.equal(preprocess(str(paths[0])), expected[:1])
    assert torch.equal(preprocess([load_image(path, 224) for path in paths]), expected)


def test_preprocess_takes_size_mean_and_std():
    grey = Image.new("RGB", (40, 30), (51, 102, 204))
    x = preprocess(grey, size=16, mean=(0, 0, 0), std=(1, 1, 1))
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 3, 5], torch.tensor([0.2, 0.4, 0.8]))


def test_preprocess_turns_and_converts_pil_images(tmp_path):
    half = Image.new("RGB", (64, 32), "white")
    half.paste("black", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    half.save(tmp_path / "turned.png", exif=exif)
    upright = preprocess(tmp_path / "turned.png", 32)
    assert torch.equal(preprocess(Image.open(tmp_path / "turned.png"), 32), upright)
    assert (upright[0, :, 2] < upright[0, :, -3]).all()  # black is above white
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert torch.equal(preprocess(transparent, 8), preprocess(Image.new("RGB", (8, 8), "white"), 8))


def test_preprocess_names_a_broken_file(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    assert "bad.jpg" in refusal(preprocess, [tmp_path / "bad.jpg"])
    assert "bad.jpg" in refusal(preprocess, str(tmp_path / "bad.jpg"))
    assert "no images" in refusal(preprocess, [])


@pytest.fixture
def decoded(monkeypatch):
    "The names of all pictures that are decoded from now on."
    names, real = [], images._read_square
    monkeypatch.setattr(
        images, "_read_square", lambda path, size: (names.append(Path(path).name), real(path, size))[1]
    )
    return names


def work_of(cache):
    return sorted(p.name for p in cache.with_name(cache.name + ".unfinished").iterdir())


# pictures of every kind, against pixels that we know

CORNERS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (20, 40, 200), "white": (250, 250, 250)}


def four_corners(width=64, height=48):
    "Red, green above blue, white: any turn or mirroring shows."
    pixels = np.zeros((height, width, 3), np.uint8)
    for colour, (y, x) in zip(CORNERS.values(), ((0, 0), (0, 1), (1, 0), (1, 1))):
        pixels[y * height // 2 : (y + 1) * height // 2, x * width // 2 : (x + 1) * width // 2] = colour
    return Image.fromarray(pixels)


def assert_corners(pixels, tolerance):
    pixels = np.asarray(pixels).astype(int)
    h, w = pixels.shape[:2]
    found = [pixels[y, x] for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]
    assert abs(np.array(found) - list(CORNERS.values())).max() <= tolerance, found


def png_16_bit_rgb(pixels):
    "A PNG with 16 bits a channel, which PIL does not write."
    h, w, _ = pixels.shape
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in pixels)

    def chunk(kind, content):
        return (
            len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", w.to_bytes(4, "big") + h.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0]))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


_KINDS = {
    "plain.jpg": (lambda im, to: im.save(to, "JPEG", quality=95), 6),
    "progressive.jpg": (lambda im, to: im.save(to, "JPEG", quality=95, progressive=True), 6),
    "cmyk.jpg": (lambda im, to: im.convert("CMYK").save(to, "JPEG", quality=95), 6),
    "cmyk.tif": (lambda im, to: im.convert("CMYK").save(to, "TIFF"), 1),
    "palette.png": (lambda im, to: im.quantize(8).save(to, "PNG"), 2),
    "alpha.png": (lambda im, to: im.convert("RGBA").save(to, "PNG"), 0),
    "16-bit.png": (lambda im, to: to.write(png_16_bit_rgb(np.asarray(im))), 1),
    "animated.gif": (
        lambda im, to: im.save(to, "GIF", save_all=True, append_images=[Image.new("RGB", im.size)]),
        2,
    ),
    "animated.png": (
        lambda im, to: im.save(to, "PNG", save_all=True, append_images=[Image.new("RGB", im.size)]),
        0,
    ),
    "animated.webp": (
        lambda im, to: im.save(
            to, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", im.size)]
        ),
        0,
    ),
    "two.mpo": (
        lambda im, to: im.save(
            to, "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", im.size)]
        ),
        6,
    ),
    "plain.bmp": (lambda im, to: im.save(to, "BMP"), 0),
}


@pytest.mark.parametrize("name", _KINDS)
def test_every_kind_of_file_gives_its_known_pixels(tmp_path, name):
    write, tolerance = _KINDS[name]
    with open(tmp_path / name, "wb") as to:
        write(four_corners(), to)
    image = load_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (64, 48)
    assert_corners(image, tolerance)
    assert_corners(_read_square(tmp_path / name, 16), tolerance + 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_of_every_depth_stays_grey(tmp_path, mode):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32))
    image = (
        Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257) if mode == "I;16" else ramp.convert(mode)
    )
    image.save(tmp_path / "a.png")
    got = np.asarray(load_image(tmp_path / "a.png")).astype(int)
    assert (got[..., 0] == got[..., 1]).all() and (got[..., 0] == got[..., 2]).all()
    if mode != "1":
        assert (got[..., 0] == np.asarray(ramp)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_stand_upright_drafted_or_not(tmp_path, orientation):
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[
        orientation
    ]  # the transposition that the note undoes
    stored = four_corners(128, 96) if back is None else four_corners(128, 96).transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert (
        load_image(tmp_path / "a.jpg").size == (128, 96)
        and load_image(tmp_path / "a.jpg", 32).size == (43, 32)
        or load_image(tmp_path / "a.jpg", 32).size == (64, 48)
    )
    assert_corners(load_image(tmp_path / "a.jpg"), 6)
    assert_corners(_read_square(tmp_path / "a.jpg", 32), 8)


@given(width=st.integers(1, 300), height=st.integers(1, 300), least=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_a_draft_is_never_below_what_is_wanted(tmp_path_factory, width, height, least):
    path = tmp_path_factory.getbasetemp() / "draft.jpg"
    Image.new("RGB", (width, height)).save(path)
    got = load_image(path, least).size
    assert all(g >= min(least, whole) and g <= whole for g, whole in zip(got, (width, height)))


def test_only_jpegs_are_drafted_and_the_draft_is_close(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    smooth.save(tmp_path / "a.png"), smooth.save(tmp_path / "a.jpg", quality=95)
    assert (_read_square(tmp_path / "a.png", 64) == resize_square(smooth, 64)).all()
    assert load_image(tmp_path / "a.jpg", 64).size == (160, 120)
    assert abs(_read_square(tmp_path / "a.jpg", 64).astype(int) - resize_square(smooth, 64)).mean() < 2


def test_the_resize_is_close_to_pils():
    rng = np.random.default_rng(0)
    for width, height, size in (
        (640, 480, 224),
        (320, 240, 224),
        (100, 150, 64),
        (30, 20, 64),
        (64, 100, 64),
        (1, 1, 32),
    ):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        assert abs(theirs - resize_square(image, size)).mean() < 1, (width, height, size)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "a.png")
    assert (_read_square(tmp_path / "a.png", 32) == (10, 200, 30)).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_twenty_thousand_by_twenty_thousand_is_refused_in_one_sentence(tmp_path, name):
    if name == "a.jpg":
        b = io.BytesIO()
        Image.new("L", (8, 8)).save(b, "JPEG")
        raw = b.getvalue()
        at = raw.index(b"\xff\xc0")
        (tmp_path / name).write_bytes(raw[: at + 5] + (20_000).to_bytes(2, "big") * 2 + raw[at + 9 :])
    else:
        b = io.BytesIO()
        Image.new("L", (1, 1)).save(b, "PNG")
        raw = b.getvalue()
        header = raw[12:16] + (20_000).to_bytes(4, "big") * 2 + raw[24:29]
        (tmp_path / name).write_bytes(raw[:12] + header + zlib.crc32(header).to_bytes(4, "big") + raw[33:])
    for least in (None, 64):
        assert "bomb" in refusal(load_image, tmp_path / name, least)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_just_above_the_limit_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "a.png")
    assert "10,000 × 9,000 pixels" in refusal(load_image, tmp_path / "a.png")


def test_half_pictures_are_refused_even_where_somebody_allows_them(tmp_path, monkeypatch):
    four_corners().save(tmp_path / "a.jpg")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "set it to False" in refusal(load_image, tmp_path / "a.jpg")


# all that cannot be used, together


def spoil(split):
    "Break five pictures in five ways; returns their ids."
    ways = {
        2: lambda p: p.write_bytes(b""),
        5: lambda p: p.write_bytes(b"<html>404</html>"),
        7: lambda p: p.write_bytes(p.read_bytes()[:45]),
        9: lambda p: (p.unlink(), p.mkdir()),
        11: lambda p: p.write_bytes(bytes(range(200))),
    }
    for row, way in ways.items():
        way(split.image_paths[row])
    return [int(split.image_ids[row]) for row in ways]


def test_all_bad_pictures_are_told_together(tmp_path):
    split = _make_split(tmp_path / "pictures", range(1, 21))
    bad = spoil(split)
    with pytest.raises(_BadImages) as caught:
        pack_images(split, 8, tmp_path / "cache", progress=False)
    e, message = caught.value, str(caught.value)
    assert e.split == "train" and [id for id, _, _ in e.bad] == bad
    for (id, path, reason), why in zip(
        e.bad, ("the file is empty", "<html>", "", "it is a folder", "no picture")
    ):
        assert path.name == f"{id:06}.png" and why in reason
    assert (
        "\n" not in message
        and "5 of the 20 of train" in message
        and "and 2 more" in message
        and "--on-bad replace" in message
    )
    assert all(e.bad[i][1].name in message for i in range(3))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_was_decoded_is_taken_over_when_bad_pictures_are_replaced(tmp_path, decoded):
    split = _make_split(tmp_path / "pictures", range(1, 21))
    bad = spoil(split)
    with pytest.raises(_BadImages):
        pack_images(split, 8, tmp_path / "cache", progress=False)
    assert sorted(decoded) == sorted(p.name for p in split.image_paths)  # each once
    decoded.clear()
    ids = sorted({*range(1, 21), 100, 101, 102, 0, 104} - set(bad))  # the new ones lie before and after
    _make_split(tmp_path / "pictures", [100, 101, 102, 0, 104])
    packed = pack_images(
        _make_split(tmp_path / "pictures", ids, make=False), 8, tmp_path / "cache", progress=False
    )
    assert sorted(decoded) == [f"{id:06}.png" for id in (0, 100, 101, 102, 104)]
    assert_right(packed, _make_split(tmp_path / "pictures", ids, make=False))
    assert work_of(tmp_path / "cache") == ["lock"] and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_mended_picture_is_the_only_one_decoded(tmp_path, decoded):
    split = _make_split(tmp_path / "pictures", range(1, 21))
    split.image_paths[4].write_bytes(b"")
    with pytest.raises(_BadImages):
        pack_images(split, 8, tmp_path / "cache", progress=False)
    decoded.clear()
    Image.new("RGB", (12, 8), colour_of(5)).save(split.image_paths[4])
    assert_right(pack_images(split, 8, tmp_path / "cache", progress=False), split)
    assert decoded == ["000005.png"]


def test_rows_of_another_size_or_split_are_not_taken_over_and_those_of_another_place_are(tmp_path, decoded):
    split = _make_split(tmp_path / "pictures", range(1, 11))
    split.image_paths[4].write_bytes(b"")
    good = split.select([0, 1, 2])
    with pytest.raises(_BadImages):
        pack_images(split, 8, tmp_path / "cache", progress=False)
    shutil.copytree(tmp_path / "pictures", tmp_path / "elsewhere")
    others = [
        (good, 16),
        (
            CaptionSplit(
                "val", good.root, good.image_ids, good.image_paths, good.captions, good.caption_image
            ),
            8,
        ),
        (_make_split(tmp_path / "elsewhere", [1, 2, 3], make=False), 8),
    ]
    for (other, size), expected in zip(others, [3, 3, 0]):  # in another place the content is the same
        decoded.clear()
        assert_right(pack_images(other, size, tmp_path / "cache", progress=False), other, size)
        assert len(decoded) == expected


def test_pictures_that_vanished_are_told_together(tmp_path):
    split = _make_split(tmp_path / "pictures", range(1, 11))
    for row in (3, 6):
        split.image_paths[row].unlink()
    with pytest.raises(_BadImages) as caught:
        pack_images(split, 8, tmp_path / "cache", progress=False)
    assert [(id, why) for id, _, why in caught.value.bad] == [
        (4, "there is no such file"),
        (7, "there is no such file"),
    ]


# interrupted, and gone on with

KILLED = """
import itertools, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_images, clip475.data.images as images
real = images._read_square
count = itertools.count()

def read_square(path, size):
    if next(count) >= 200:
        time.sleep(10**6)  # until the test has seen enough, and kills this process
    return real(path, size)

images._read_square = read_square
images._cores = lambda: 2
split = test_images._make_split(Path({pictures!r}), range(1, 301), make=False)
images.pack_images(split, 8, {cache!r}, progress=False)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "A folder in which a packing process was killed part of the way."
    tmp = tmp_path_factory.mktemp("killed")
    _make_split(tmp / "pictures", range(1, 301))
    code = KILLED.format(
        tests=str(Path(__file__).parent), pictures=str(tmp / "pictures"), cache=str(tmp / "cache")
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )

    def lines():
        return sum(len(p.read_text().splitlines()) for p in (tmp / "cache.unfinished").glob("*.rows"))

    while lines() < 66:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 66 <= lines() < 300 and list((tmp / "cache").iterdir()) == []
    return tmp


@pytest.fixture
def rest(killed, tmp_path):
    "A copy of what the killed process left, the pictures where they were."
    shutil.copytree(killed / "cache", tmp_path / "cache")
    shutil.copytree(killed / "cache.unfinished", tmp_path / "cache.unfinished")
    return _make_split(killed / "pictures", range(1, 301), make=False), tmp_path / "cache"


def test_a_killed_packing_is_gone_on_with(rest, decoded):
    split, cache = rest
    [journal] = cache.with_name("cache.unfinished").glob("*.rows")
    before = sum(line.count(" ") == 2 for line in journal.read_text().splitlines()[1:])
    assert_right(pack_images(split, 8, cache, progress=False), split)
    assert len(decoded) == 300 - before and before >= 64
    assert work_of(cache) == ["lock"] and len(list(cache.iterdir())) == 2
    decoded.clear()
    assert_right(pack_images(split, 8, cache, progress=False), split)
    assert decoded == []


@pytest.mark.parametrize(
    "harm", ["a row", "torn line", "binary journal", "no journal", "no array", "short array", "other version"]
)
def test_what_a_crash_spoiled_is_decoded_again(rest, decoded, harm):
    split, cache = rest
    unfinished = cache.with_name("cache.unfinished")
    [journal], [array] = unfinished.glob("*.rows"), unfinished.glob("*.npy")
    lines = journal.read_text().splitlines()
    known = sum(line.count(" ") == 2 for line in lines[1:])
    expected = 300
    if harm == "a row":
        with open(array, "r+b") as f:
            f.seek(128 + 3 * 8 * 8 * 3 + 5)
            f.write(b"\xee\xff")
        expected = 300 - known + 1
    if harm == "torn line":
        journal.write_text(journal.read_text()[:-4])
        expected = 300 - known + 1
    if harm == "binary journal":
        journal.write_bytes(bytes(range(256)))
    if harm == "no journal":
        journal.unlink()
    if harm == "no array":
        array.unlink()
    if harm == "short array":
        array.write_bytes(array.read_bytes()[:2000])
    if harm == "other version":
        journal.write_text("\n".join([lines[0].replace("bicubic", "nearest"), *lines[1:]]))
    assert_right(pack_images(split, 8, cache, progress=False), split)
    assert len(decoded) == expected and work_of(cache) == ["lock"]


def test_stopping_twice_loses_nothing(tmp_path, monkeypatch, decoded):
    split = _make_split(tmp_path / "pictures", range(1, 401))
    real, left = images._read_square, [150]

    def some(path, size):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(path, size)

    monkeypatch.setattr(images, "_read_square", some)
    monkeypatch.setattr(images, "_cores", lambda: 1)
    for _ in range(2):
        left[0] = 150
        with pytest.raises(KeyboardInterrupt):
            pack_images(split, 8, tmp_path / "cache", progress=False)
    left[0] = 10**6
    assert_right(pack_images(split, 8, tmp_path / "cache", progress=False), split)
    assert 400 <= len(decoded) < 400 + 2 * 64


def test_leftovers_of_the_same_target_are_cleaned_and_others_stay(tmp_path):
    split, cache = _make_split(tmp_path / "pictures", range(1, 4)), tmp_path / "cache"
    unfinished = tmp_path / "cache.unfinished"
    for folder in (cache, unfinished):
        folder.mkdir()
    stale = [
        cache / ".part-99-ab-train-8px-0123.npy",
        unfinished / "train-8px-0123.npy",
        unfinished / "train-8px-0123.rows",
        unfinished / "train-8px-4567.rows",
    ]
    others = [
        cache / ".part-99-ab-val-8px-0123.npy",
        unfinished / "train-80px-0123.npy",
        unfinished / "val-8px-0123.npy",
    ]
    for file in stale + others:
        file.write_text("x")
    assert_right(pack_images(split, 8, cache, progress=False), split)
    assert not any(file.exists() for file in stale) and all(file.exists() for file in others)


def test_two_at_once_decode_each_picture_once(tmp_path, decoded):
    split = _make_split(tmp_path / "pictures", range(1, 61))
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(pack_images(split, 8, tmp_path / "cache", progress=False)))
        for _ in range(3)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(got) == 3 and len(decoded) == 60
    for packed in got:
        assert_right(packed, split)


def test_rebuild_decodes_all_of_it_again(tmp_path, decoded):
    split = _make_split(tmp_path / "pictures", range(1, 11))
    first = pack_images(split, 8, tmp_path / "cache", progress=False)
    again = pack_images(split, 8, tmp_path / "cache", progress=False, rebuild=True)
    assert len(decoded) == 20 and (first == again).all() and len(list((tmp_path / "cache").iterdir())) == 2


# room on the disk


def test_a_full_disk_is_told_before_it_is_filled(tmp_path, monkeypatch, decoded):
    split = _make_split(tmp_path / "pictures", range(1, 11))
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refusal(pack_images, split, 8, tmp_path / "cache", progress=False)
    assert (
        f"{10 * 8 * 8 * 3:,} bytes" in message and "1,000 are free" in message and "CLIP475_CACHE" in message
    )
    assert decoded == [] and list((tmp_path / "cache").iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_keeps_what_is_done(tmp_path, monkeypatch, decoded):
    split = _make_split(tmp_path / "pictures", range(1, 201))
    real = images._record

    def full(own, f, journal, row, key, pixels):
        if row == 150:
            raise OSError(28, "No space left on device")
        real(own, f, journal, row, key, pixels)

    monkeypatch.setattr(images, "_record", full)
    assert "No space left on device" in refusal(pack_images, split, 8, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(images, "_record", real)
    decoded.clear()
    assert_right(pack_images(split, 8, tmp_path / "cache", progress=False), split)
    assert len(decoded) <= 200 - 128


def test_the_size_is_said_before(tmp_path, capfd):
    split = _make_split(tmp_path / "pictures", range(1, 11))
    pack_images(split, 64, tmp_path / "cache", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "10 pictures at 64×64 px, 0.1 MB in" in err
    pack_images(split, 64, tmp_path / "cache", progress=True)
    assert capfd.readouterr() == ("", "")


# what a cache was made from


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("whole")
    split = _make_split(tmp / "pictures", range(1, 11))
    return split, Path(pack_images(split, 8, tmp / "cache", progress=False).filename)


@pytest.fixture
def packed_file(whole, tmp_path):
    split, file = whole
    for p in file.parent.iterdir():
        shutil.copy(p, tmp_path)
    return split, tmp_path / file.name


FIELDS = ["split", "images", "size", "files", "transform", "clip475", "pillow", "checksum"]


def test_the_manifest_says_it_all(packed_file):
    split, file = packed_file
    manifest = json.loads(file.with_suffix(".json").read_text())
    assert (
        list(manifest) == FIELDS
        and manifest["split"] == split.fingerprint
        and (manifest["images"], manifest["size"]) == (10, 8)
    )
    assert_right(_open_packed(file, split, 8), split)
    assert not _open_packed(str(file), split, 8).flags.writeable


@pytest.mark.parametrize("field", FIELDS + ["more"])
@pytest.mark.parametrize("harm", ["flipped", "gone", "null"])
def test_each_field_of_the_manifest_is_checked(packed_file, field, harm):
    split, file = packed_file
    beside = file.with_suffix(".json")
    manifest = json.loads(beside.read_text())
    if harm == "gone":
        manifest.pop(field, None)
        manifest |= {"more": 1} if field == "more" else {}
    else:
        manifest[field] = (
            {
                "flipped": manifest[field] + 1
                if isinstance(manifest.get(field), int)
                else f"x{manifest.get(field)}",
                "null": None,
            }[harm]
            if field != "more"
            else 1
        )
    beside.write_text(json.dumps(manifest))
    message = refusal(_open_packed, file, split, 8)
    assert repr(field) in message and str(beside) in message and "clip475 prepare --rebuild" in message


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", "\x00"])
def test_an_array_without_its_manifest_is_refused(packed_file, content):
    split, file = packed_file
    if content is None:
        file.with_suffix(".json").unlink()
    else:
        file.with_suffix(".json").write_text(content)
    assert str(file.with_suffix(".json")) in refusal(_open_packed, file, split, 8)


@pytest.mark.parametrize("harm", ["cut", "empty", "dtype", "shape", "longer", "order", "pickle", "gone"])
def test_an_array_that_is_another_is_refused(packed_file, harm):
    split, file = packed_file
    array = np.load(file)
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    if harm == "empty":
        file.write_bytes(b"")
    if harm == "dtype":
        np.save(file, array.astype(np.int8))
    if harm == "shape":
        np.save(file, array.reshape(10, 4, 16, 3))
    if harm == "longer":
        np.save(file, np.concatenate([array, array]))
    if harm == "order":
        np.save(file, np.asfortranarray(array))
    if harm == "pickle":
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    if harm == "gone":
        file.unlink()
    message = refusal(_open_packed, file, split, 8)
    assert str(file) in message and "clip475 prepare --rebuild" in message


def test_another_split_size_or_picture_is_refused(packed_file, tmp_path):
    split, file = packed_file
    assert "'split'" in refusal(_open_packed, file, split.select(slice(None, None, -1)), 8)
    assert "'size'" in refusal(_open_packed, file, split, 16)
    shutil.copytree(split.root, tmp_path / "pictures")  # the same pictures in another place are the same
    moved = _make_split(tmp_path / "pictures", range(1, 11), make=False)
    assert_right(_open_packed(file, moved, 8), split)
    os.utime(moved.image_paths[3], (1, 1))
    assert_right(_open_packed(file, moved, 8), split)
    shutil.copy2(moved.image_paths[2], moved.image_paths[3])
    assert "'files'" in refusal(_open_packed, file, moved, 8)


# captions


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    k=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_k_captions_of_each_image(counts, k, seed, epoch):
    owner = np.repeat(np.arange(len(counts)), counts)
    rows = _caption_choices(owner, seed, epoch, k)
    assert (
        rows.shape == (len(counts), k)
        and rows.dtype == torch.int64
        and rows.equal(_caption_choices(torch.from_numpy(owner), seed, epoch, k))
    )
    assert (owner[rows.numpy()] == np.arange(len(counts))[:, None]).all()
    for has, own in zip(counts, rows.tolist()):
        assert len(set(own)) == min(has, k)
    if k == 1:
        assert rows[:, 0].equal(_caption_choice(owner, seed, epoch))


def test_all_captions_come_up_equally_often():
    owner = np.repeat(np.arange(200), np.random.default_rng(0).choice([5, 6, 7], 200))
    seen = sum(
        torch.bincount(_caption_choices(owner, 42, e, 3).flatten(), minlength=len(owner)) for e in range(300)
    ).numpy()
    expected = 900 / np.bincount(owner)[owner]
    assert abs(seen / expected - 1).mean() < 0.1 and seen.min() > 0


@pytest.mark.parametrize("k", [0, -1, 2.0])
def test_a_number_of_captions_that_is_none(k):
    assert "at least 1" in refusal(_caption_choices, np.array([0, 0, 1]), 0, 0, k)


# augmentation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pixels():
    smooth = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (48, 48), Image.Resampling.BICUBIC
        )
        for i in range(12)
    ]
    return torch.from_numpy(np.stack([np.asarray(image) for image in smooth]))


EVERY = [
    "none",
    "crop",
    "flip",
    "jitter",
    "crop+flip",
    "crop+jitter",
    "flip+jitter",
    "crop+flip+jitter",
    "jitter+crop",
]


def test_none_changes_nothing_and_draws_nothing(pixels):
    g = generator()
    before = g.get_state()
    assert augment(pixels, "none", 48, g) is pixels and g.get_state().equal(before)


@pytest.mark.parametrize("kinds", EVERY)
def test_the_generator_decides(pixels, kinds):
    kept = pixels.clone()
    a, b, c = (augment(pixels, kinds, 48, generator(seed)) for seed in (1, 1, 2))
    assert a.shape == (12, 48, 48, 3) and a.dtype == torch.uint8 and a.equal(b) and pixels.equal(kept)
    assert kinds == "none" or not a.equal(c)


@pytest.mark.parametrize("kinds", EVERY)
def test_each_picture_is_changed_on_its_own(pixels, kinds):
    other = pixels.clone()
    other[3] = 255 - other[3]
    a, b = augment(pixels, kinds, 48, generator()), augment(other, kinds, 48, generator())
    same = [i for i in range(12) if a[i].equal(b[i])]
    assert same == [i for i in range(12) if i != 3]


def test_pictures_of_a_batch_differ(pixels):
    alike = pixels[:1].expand(8, -1, -1, -1)
    for kinds in ("crop", "jitter"):
        assert len(torch.unique(augment(alike, kinds, 48, generator()), dim=0)) == 8


def test_a_flip_is_a_flip(pixels):
    a = augment(pixels, "flip", 48, generator())
    flipped = [a[i].equal(pixels[i].flip(1)) for i in range(12)]
    assert (
        any(flipped) and not all(flipped) and all(f or a[i].equal(pixels[i]) for i, f in enumerate(flipped))
    )
    many = augment(
        torch.tensor([[[[0] * 3, [255] * 3]] * 2], dtype=torch.uint8).expand(4000, -1, -1, -1),
        "flip",
        2,
        generator(),
    )
    assert abs((many[:, 0, 0, 0] == 255).float().mean() - 0.5) < 0.04


def test_a_crop_is_the_same_whatever_else_is_asked_for(pixels):
    plain, mirrored = augment(pixels, "crop", 32, generator()), augment(pixels, "crop+flip", 32, generator())
    flipped = [not a.equal(b) for a, b in zip(plain, mirrored)]
    assert any(flipped) and not all(flipped) and plain.shape[1:] == (32, 32, 3)


def test_crops_are_as_large_and_as_oblong_as_promised():
    boxes = _boxes(torch.rand(20_000, 4, generator=generator()))
    area, shape = boxes[:, 2] * boxes[:, 3], boxes[:, 2] / boxes[:, 3]
    assert 0.6 - 1e-5 <= area.min() < 0.61 and 0.99 < area.max() <= 1 + 1e-5 and abs(area.mean() - 0.8) < 0.01
    assert 3 / 4 - 1e-4 <= shape.min() < 0.76 and 1.31 < shape.max() <= 4 / 3 + 1e-4
    assert (boxes[:, :2].abs() + boxes[:, 2:] <= 1 + 1e-5).all()


def test_a_crop_shows_what_lies_in_its_box():
    y, x = torch.meshgrid(torch.arange(100.0), torch.arange(100.0), indexing="ij")
    ramp = torch.stack([x, y, x + y])[None]  # (1, 3, 100, 100)
    box = torch.tensor([[0.2, -0.1, 0.5, 0.6]])  # columns 35…85, rows 15…75
    got = _crop(ramp, box, 50)[0]
    torch.testing.assert_close(got[0, 0], 35 - 0.5 + (torch.arange(50) + 0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(got[1, :, 0], 15 - 0.5 + 1.2 * (torch.arange(50) + 0.5), atol=1e-3, rtol=0)


def test_jitter_is_small_and_keeps_grey_grey(pixels):
    a = augment(pixels, "jitter", 48, generator())
    assert 1 < (a.float() - pixels).abs().mean() < 60
    grey = torch.full((64, 4, 4, 3), 120, dtype=torch.uint8)
    got = augment(grey, "jitter", 4, generator()).float()
    assert (
        (got.amax(3) - got.amin(3)).max() <= 1
        and 120 * 0.8 - 1 <= got.min()
        and got.max() <= 120 * 1.2 + 1
        and got.std() > 3
    )


def test_what_does_not_fit_is_refused(pixels):
    assert "resize them" in refusal(augment, pixels, "none", 32, generator())
    assert "resize them" in refusal(augment, pixels, "flip+jitter", 32, generator())
    assert "augment 'blur' is not known" in refusal(augment, pixels, "crop+blur", 48, generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kinds", EVERY)
def test_a_gpu_gives_what_the_cpu_gives(pixels, kinds):
    a, b = augment(pixels, kinds, 48, generator()), augment(pixels.cuda(), kinds, 48, generator())
    assert b.is_cuda and (a.int() - b.cpu().int()).abs().max() <= 1


def test_the_size_to_pack_at():
    for preset, whole, larger in (("coco", 224, 240), ("tiny", 64, 68)):
        config = LabConfig.from_preset(preset)
        assert (
            _packed_size(config, True)
            == _packed_size(config, False)
            == _packed_size(config.replace(augment="flip+jitter"), True)
            == whole
        )
        assert (
            _packed_size(config.replace(augment="flip+crop"), True) == larger
            and _packed_size(config.replace(augment="crop"), False) == whole
        )
    assert "add crop to augment" in refusal(_packed_size, config.replace(train_crop_size=32), True)


def test_the_viewer_is_a_figure(pixels):
    figure = _augmentation_grid(pixels[0], kinds=("crop", "flip+jitter"), count=3, seed=1)
    assert len(figure.axes) == 8 and figure.axes[0].get_title() == "as it is"
    assert len(_augmentation_grid(pixels[0].numpy(), kinds=("crop",), size=32, count=2).axes) == 3


# training and evaluation see a pixel alike


def test_training_and_evaluation_normalise_a_pixel_alike(tmp_path):
    from clip475.training.batches import PreparedSplit
    from clip475.training.steps import embed_images, start_training, train_epoch

    config = LabConfig.from_preset(
        "tiny",
        image_size=32,
        batch_size=4,
        epochs=1,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        head_hidden=16,
        precision="fp32",
    )
    split = _make_split(tmp_path / "pictures", range(1, 9))
    one = np.array([10, 100, 250], np.uint8)
    train = PreparedSplit(
        split,
        np.broadcast_to(one, (8, 32, 32, 3)).copy(),
        torch.nn.functional.normalize(torch.randn(8, 512, generator=generator()), dim=1),
    )
    state, seen = start_training(config), []
    state.model.image_encoder.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().cpu())
    )
    train_epoch(state, train, config, progress=False)
    trained = len(seen)
    embed_images(state.model, train.pixels, config)
    assert 2 <= trained < len(seen)
    by_hand = torch.tensor((one / 255 - config.image_mean) / config.image_std).float()[None, :, None, None]
    for x in seen:
        torch.testing.assert_close(x, by_hand.expand_as(x), check_stride=False, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        normalize(train.pixels[:1], config.image_mean, config.image_std), seen[0][:1], atol=0, rtol=0
    )
