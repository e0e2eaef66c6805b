"""Search in a folder of one's own: what people have, what goes wrong with it, and what is embedded again.

The model has random weights: what it finds is worth nothing, so the tests compare with its own embeddings."""

import json
import os
import shutil
import sys
import time
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from clip475.app import cli
from clip475.core.files import LabError
from clip475.data import pixels as pixels_module
from clip475.data.pixels import load_image
from clip475.searching import folder as folder_module
from clip475.searching.folder import _index_file, _pictures_in, search
from clip475.searching.model import load

pytestmark = pytest.mark.usefixtures("one_thread")
ESCAPE = "red\x1b[31m\u202e<b>&.png"  # a terminal would turn red, a browser bold


@pytest.fixture(scope="module")
def run(tmp_path_factory, save_random_run):
    "A run folder with random weights, for pictures of 32 pixels."
    return save_random_run(tmp_path_factory.mktemp("runs") / "run", image_size=32)


@pytest.fixture(scope="module")
def model(run):
    return load(run)


def picture(seed, size=(40, 30)):
    "A picture of soft colours that no other seed gives."
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture()
def album(tmp_path, monkeypatch):
    "Twelve pictures in two folders, and a cache of its own."
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "album"
    (place / "old").mkdir(parents=True)
    for i in range(12):
        picture(i).save(place / ("old" if i % 2 else "") / f"{i}.png")
    return place


@pytest.fixture()
def find(model):
    def find(query, folder, **options):
        return search(query, folder, **{"model": model, "progress": False, **options})

    return find


def scores_of(found):
    return dict(zip(found.paths, found.scores, strict=True))


# ── what people have ──


def test_every_format_is_read_the_right_way_up(album, find, model):
    shown = picture(99, (48, 32))
    turned = Image.Exif()
    turned[0x0112] = 6
    shown.rotate(90, expand=True).save(album / "turned.jpg", exif=turned, quality=100, subsampling=0)
    shown.save(album / "plain.webp", lossless=True)
    shown.save(album / "moving.gif", save_all=True, append_images=[picture(1, (48, 32))])
    shown.save(album / "scan.TIFF")
    found = find(shown, album, k=4)
    assert {Path(p).name for p in found.paths} == {"turned.jpg", "plain.webp", "moving.gif", "scan.TIFF"}
    assert min(found.scores) > 0.99 and found.pictures == 16


def test_heic_needs_a_package_and_is_tried_again_once_it_is_there(album, find, monkeypatch):
    (album / "phone.heic").write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "pip install pillow-heif" in find("a dog", album).skipped[str(album / "phone.heic")]

    class Opener:  # what pillow-heif does: it registers a plugin for the format HEIF
        @staticmethod
        def register_heif_opener():
            Image.register_open("HEIF", lambda fp, name: picture_file(77), lambda start: True)

    def picture_file(seed):
        data = BytesIO()
        picture(seed).save(data, "PNG")
        return Image.open(data)

    monkeypatch.setitem(sys.modules, "pillow_heif", Opener)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    again = find(picture(77), album, k=1)
    assert again.paths == [str(album / "phone.heic")] and again.embedded == 1 and not again.skipped


def test_a_large_picture_is_found_among_small_ones(album, find):
    "Fifty megapixels, as PNG and as JPEG; the JPEG is decoded at a fraction."
    flat = Image.new("RGB", (8_000, 6_250), (200, 30, 30))
    flat.save(album / "large.png", compress_level=1)
    flat.save(album / "large.jpg")
    assert load_image(album / "large.jpg", 32).size == (1_000, 782)
    found = find(Image.new("RGB", (32, 32), (200, 30, 30)), album, k=2)
    assert {Path(p).name for p in found.paths} == {"large.png", "large.jpg"} and min(found.scores) > 0.99


def test_of_large_pictures_one_is_decoded_at_a_time(album, find, monkeypatch):
    "However many threads read: a picture of fifty megapixels takes hundreds of megabytes until it is small."
    busy, most, real = [], [], pixels_module._shrink_large

    def watch(image, size):
        busy.append(image)
        time.sleep(0.01)  # long enough for the other threads to come here, if they may
        most.append(len(busy))
        busy.pop()
        return real(image, size)

    monkeypatch.setattr(pixels_module, "_LARGE", 100)
    monkeypatch.setattr(pixels_module, "_shrink_large", watch)
    monkeypatch.setattr(folder_module, "_THREADS", 8)
    assert find("a dog", album).embedded == 12 and most == [1] * 12


# ── what goes wrong ──


def test_what_cannot_be_read_is_said_and_the_rest_is_found(album, find, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # a call of it would raise a TypeError
    bad = {
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "as no picture"),
        "page.png": (b"<html>404</html>", "as no picture does"),
        "empty.gif": (b"", "the file is empty"),
        "half.png": ((album / "0.png").read_bytes()[:200], ""),
    }
    for name, (content, _) in bad.items():
        (album / name).write_bytes(content)
    Image.new("1", (10_000, 9_000)).save(album / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find("a dog", album, k=20)
    assert found.pictures == 12 == len(found)
    assert {Path(p).name for p in found.skipped} == {*bad, "bomb.png"}
    assert "decompression bomb" in found.skipped[str(album / "bomb.png")]
    for name, (_, reason) in bad.items():
        assert reason in found.skipped[str(album / name)]


def test_a_broken_note_is_no_broken_picture(album, find):
    note = Image.Exif()
    note[0x0112] = 6
    raw = note.tobytes()
    shown = picture(50, (48, 32))
    for i in range(6, len(raw)):
        shown.save(album / f"note{i}.jpg", exif=raw[:i] + b"\xff" * (len(raw) - i), quality=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find(shown, album, k=50)
    assert not found.skipped and found.pictures == 12 + len(raw) - 6


def test_what_may_pass_is_tried_again(album, find, monkeypatch):
    "A disk that fails, a file that changes under the reader: a reason, and another try at the next search."
    real = folder_module._read_square

    def fails(path, size, file):
        if path.name == "0.png":
            raise OSError(5, "Input/output error")
        if path.name == "2.png":
            os.utime(path, ns=(1, 1))
        if path.name == "4.png":
            path.unlink()
        return real(path, size, file)

    (album / "gone.png").symlink_to(album / "nowhere.png")
    monkeypatch.setattr(folder_module, "_read_square", fails)
    found = find("a dog", album)
    reasons = {Path(p).name: why for p, why in found.skipped.items()}
    assert reasons["0.png"] == "Input/output error" and "changed while it was read" in reasons["2.png"]
    monkeypatch.setattr(folder_module, "_read_square", real)
    again = find("a dog", album, k=20)
    assert not again.skipped and again.pictures == 11 and again.embedded == 2


def test_a_file_that_is_deleted_after_the_walk_is_not_remembered_as_bad(album, find, monkeypatch):
    content, real = (album / "0.png").read_bytes(), _pictures_in

    def walk(folder):
        found = real(folder)
        (album / "0.png").unlink()
        return found

    monkeypatch.setattr(folder_module, "_pictures_in", walk)
    assert find("a dog", album).skipped == {str(album / "0.png"): "No such file or directory"}
    monkeypatch.setattr(folder_module, "_pictures_in", real)
    (album / "0.png").write_bytes(content)
    assert find("a dog", album).pictures == 12


def test_folders_that_may_not_be_read_links_in_circles_and_pipes(album, find, monkeypatch):
    (album / "loop.png").symlink_to(album / "loop.png")
    (album / "circle").symlink_to(album)
    os.mkfifo(album / "pipe.png")
    real = os.scandir

    def refuses(path):
        if str(path).endswith("old"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuses)
    found = find("a dog", album)
    assert found.pictures == 6
    reasons = {Path(p).name: why for p, why in found.skipped.items()}
    assert reasons["old"] == "Permission denied" and reasons["pipe.png"] == "it is no plain file"
    assert "symbolic links" in reasons["loop.png"] and len(reasons) == 3


def test_mistakes_get_one_sentence(album, find, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(folder_module, "_DEFAULT_MODEL", "nowhere")
    for sentence, call in (
        ("there are no pictures", lambda: find("a dog", tmp_path / "empty")),
        ("no such folder", lambda: find("a dog", album / "0.png")),
        ("nowhere: there is no such folder", lambda: find("a dog", album, model=None)),
        ("give a text, a picture or classes", lambda: find(None, album)),
        ("plus and minus change a search by picture", lambda: find("a dog", album, plus="snow")),
        ("name another picture to search by", lambda: find(album / "no.png", album)),
        ("bytes that are no text", lambda: find("a dog\udce9", album)),
        ("the query is empty", lambda: find(album / "0.png", album, minus=" ")),
        ("leave one of them out", lambda: find(None, album, classes=["a dog", "a dog"])),
    ):
        with pytest.raises(LabError, match=sentence) as error:
            call()
        assert "\n" not in str(error.value)


# ── what is embedded again ──


def test_renamed_moved_and_copied_pictures_are_not_embedded_again(album, find, tmp_path):
    before = scores_of(find("a dog", album, k=99))
    (album / "0.png").rename(album / "zebra.png")
    (album / "old" / "1.png").rename(album / "1.png")
    shutil.copy(album / "2.png", album / "copy.png")
    found = find("a dog", album, k=99)
    after = scores_of(found)
    assert found.embedded == 0 and found.pictures == 13
    assert after[str(album / "zebra.png")] == before[str(album / "0.png")]
    assert after[str(album / "copy.png")] == before[str(album / "2.png")]
    album.rename(tmp_path / "moved")  # another folder, another index, the same contents
    assert find("a dog", tmp_path / "moved").embedded == 0
    assert find("a dog", tmp_path / "moved" / "old").embedded == 0


def test_equal_names_sizes_and_times_are_not_the_same_picture(album, find, tmp_path):
    "A folder that takes the place of another, and a file written over with its time set back."
    for i in range(2):
        place = tmp_path / f"twin{i}"
        place.mkdir()
        pixels = np.full((20, 20, 3), 40 + 160 * i, np.uint8)
        pixels[: 10 + i] = 90
        Image.fromarray(pixels).save(place / "a.bmp")
        os.utime(place / "a.bmp", ns=(10**18, 10**18))
    first, second = (find("a dog", tmp_path / f"twin{i}").scores for i in range(2))
    assert first != second
    (tmp_path / "twin0").rename(tmp_path / "away")
    (tmp_path / "twin1").rename(tmp_path / "twin0")
    assert find("a dog", tmp_path / "twin0").scores == second
    (tmp_path / "twin0" / "a.bmp").write_bytes((tmp_path / "away" / "a.bmp").read_bytes())
    os.utime(tmp_path / "twin0" / "a.bmp", ns=(10**18, 10**18))
    assert find("a dog", tmp_path / "twin0").scores == first


def test_a_flipped_byte_in_the_index_is_noticed(album, find, model):
    expected = find("a dog", album, k=12)
    file = _index_file(album.resolve(), model)
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 0x40  # in the embeddings
    file.write_bytes(raw)
    again = find("a dog", album, k=12)
    assert again.embedded == 12 and again.scores == expected.scores


def test_a_cache_that_cannot_be_written_costs_one_warning(album, find, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="the index cannot be kept") as caught:
        assert find("a dog", album).embedded == 12
    assert len(caught) == 1


# ── words, classes, the page ──


def test_words_beside_a_picture_are_those_of_the_vectors(album, find, model):
    found = find(album / "0.png", album, k=3, plus=["snow"], minus="a dog")
    image = model.encode_image(album / "0.png")[0]
    snow, dog = model.encode_text(["snow", "a dog"])
    names = sorted(album.rglob("*.png"), key=lambda path: path.relative_to(album).as_posix())
    scores = model.similarity(model.encode_image(names), (image + snow - dog)[None])[:, 0]
    best = scores.argsort(descending=True)[:3]
    assert found.paths == [str(names[i]) for i in best]
    torch.testing.assert_close(torch.tensor(found.scores), scores[best], atol=1e-4, rtol=0)


def test_classes_sort_every_picture(album, find, model):
    names = ["a dog", "a boat", "a car"]
    found = find(None, album, k=2, classes=names)
    assert list(found.counts) == names and sum(found.counts.values()) == 12 == len(found.classes)
    for path, (name, probability) in found.classes.items():
        (best,) = model.classify(path, names, k=1)
        assert best[0][0] == name and best[0][1] == pytest.approx(probability, abs=1e-3)
    assert [item["score"] for item in found] == [round(item["probability"], 4) for item in found]
    mixed = find("a red boat", album, k=2, classes=names)
    assert [item["class"] for item in mixed] == [found.classes[p][0] for p in mixed.paths]


def test_the_page_holds_its_pictures_and_no_foreign_markup(album, find, tmp_path):
    shutil.copy(album / "0.png", album / ESCAPE)
    (album / "broken <i>.jpg").write_bytes(b"<script>")
    found = find("<script>alert(1)</script>", album, k=99)
    text = found.save_page(tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count('<img src="data:image/jpeg;base64,') == 13 == text.count(' alt="')
    assert "<script" not in text and "<b>&.png" not in text and "<i>" not in text
    assert "\x1b" not in text and "\u202e" not in text and r"\x1b[31m" in text
    assert "color-scheme:light dark" in text and "1 skipped" in text
    assert "\x1b" not in repr(found)
    Path(found.paths[0]).unlink()
    assert "there is no such file" in found.save_page(tmp_path / "page.html").read_text(encoding="utf-8")
    of_picture = find(picture(3), album, k=1).save_page(tmp_path / "other.html")
    assert of_picture.read_text(encoding="utf-8").count("<img") == 2


# ── the command ──


@pytest.fixture()
def command(run, capsys):
    def command(*argv):
        "Exit code, stdout and stderr of a search with the run."
        code = cli.main(["search", *map(str, argv), "--run", str(run)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_the_command_says_what_python_says(album, command, find, tmp_path):
    (album / "bad.jpg").write_bytes(b"no picture")
    code, out, err = command("a red boat", "--images", album, "-k", 3, "--json")
    found, told = json.loads(out), find("a red boat", album, k=3)
    assert code == 0 and found["embedded"] == found["pictures"] == 12 and found["query"] == "a red boat"
    assert [r["file"] for r in found["results"]] == told.paths
    assert [r["rank"] for r in found["results"]] == [1, 2, 3] and found["results"][0]["score"] == told.scores[
        0
    ]
    assert found["skipped"] == [
        {"file": str(album / "bad.jpg"), "reason": told.skipped[str(album / "bad.jpg")]}
    ]
    assert "<img" in Path(found["page"]).read_text(encoding="utf-8")
    code, out, err = command("a red boat", "--images", album, "-k", 3, "--page", tmp_path / "my.html")
    assert code == 0 and all(path in out for path in told.paths) and "0 of them new" in out
    assert "skipped: " in out and f"page: {tmp_path / 'my.html'}" in out and (tmp_path / "my.html").is_file()


def test_the_command_takes_pictures_words_and_classes(album, command, find):
    given = ("--image", album / "0.png", "--plus", "in the snow", "--minus", "a dog", "--images", album)
    found = json.loads(command(*given, "--json")[1])
    told = find(album / "0.png", album, plus=["in the snow"], minus=["a dog"])
    assert [r["file"] for r in found["results"]] == told.paths
    assert found["query"] == "0.png +in the snow -a dog"
    code, out, _ = command("--images", album, "--classes", "a dog, a boat", "-k", 1)
    assert code == 0 and "× a dog" in out and "× a boat" in out
    found = json.loads(command("--images", album, "--classes", "a dog, a boat", "--json")[1])
    assert sum(found["counts"].values()) == 12 == len(found["classes"]) and found["query"] == "a dog, a boat"


def test_odd_names_reach_neither_the_terminal_nor_crash_it(album, command):
    shutil.copy(album / "0.png", album / ESCAPE)
    shutil.copy(album / "2.png", os.fsencode(album) + b"/caf\xe9\xff.png")
    code, out, err = command("a dog", "--images", album, "-k", 99)
    assert code == 0 and "\x1b" not in out + err and "\u202e" not in out
    out.encode("utf-8")
    code, out, err = command("a dog", "--images", album, "-k", 99, "--json")
    assert "\x1b" not in out and "\u202e" not in out
    files = {os.fsencode(Path(r["file"]).name) for r in json.loads(out)["results"]}
    assert {b"caf\xe9\xff.png", ESCAPE.encode()} <= files and len(files) == 14


def test_the_command_refuses_what_has_no_effect(album, command):
    for sentence, argv in (
        ("give one of them", ["a dog", "--image", album / "0.png", "--images", album]),
        ("leave them out with --images", ["a dog", "--captions", "--images", album]),
        ("leave them out with --images", ["a dog", "--data", album, "--images", album]),
        ("name them with --images", ["a dog", "--classes", "a dog,a boat"]),
        ("name them with --images", ["a dog", "--page", "a.html"]),
        ("give a text, a picture or classes", ["--images", album]),
        ("change a search by picture", ["--images", album, "--classes", "a dog,a cat", "--plus", "snow"]),
    ):
        code, out, err = command(*argv)
        assert code == 2 and not out and sentence in err and err.count("\n") == 1


def test_an_interrupted_search_is_one_line_and_keeps_what_was_done(album, command, find, monkeypatch):
    original, portions = folder_module._embed_portion, []

    def stops(*args):
        if len(portions) == 2:
            raise KeyboardInterrupt
        portions.append(args)
        return original(*args)

    monkeypatch.setattr(folder_module, "_PORTION", 4)
    monkeypatch.setattr(folder_module, "_embed_portion", stops)
    code, out, err = command("a dog", "--images", album)
    last = err.splitlines()[-1]
    assert code == 130 and not out and last.startswith("clip475: stopped after 8 of 12 new pictures")
    monkeypatch.setattr(folder_module, "_embed_portion", original)
    assert find("a dog", album).embedded == 4


def test_a_cache_that_cannot_be_written_is_one_note(album, command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "file"))
    code, out, err = command("a dog", "--images", album)
    assert code == 0 and out.count("the index cannot be kept") == 1 and "page:" not in out
    assert "Warning" not in err


def test_the_model_is_photos_by_default(album, capsys, monkeypatch, run):
    monkeypatch.setattr(folder_module, "_DEFAULT_MODEL", str(run))
    assert cli.main(["search", "a dog", "--images", str(album), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(run)
    monkeypatch.undo()
    assert folder_module._DEFAULT_MODEL == "photos"


# ── the panel ──


def test_the_search_panel_opens_a_folder(album, model, find):
    panels = pytest.importorskip("clip475.app.panels")
    shutil.copy(album / "0.png", album / ESCAPE)
    panel = panels.search_panel(model, "a red boat", k=4, folder=album)
    parts = panel.parts
    assert [card.item["image_path"] for card in parts.cards] == find("a red boat", album, k=4).paths
    assert "among 13 in" in parts.message.value
    chosen = Path(parts.cards[2].item["image_path"])
    parts.cards[2].button.click()
    first = Path(parts.cards[0].item["image_path"])  # itself, or its copy
    assert first.read_bytes() == chosen.read_bytes() and parts.cards[0].item["score"] > 0.99
    parts.count.value = 13
    shown = "".join(card.html.value for card in parts.cards)
    assert shown.count("<img") == 13 and "\x1b" not in shown and "<b>&" not in shown
    for folder in ("", str(album / "nowhere")):
        parts.folder.value = folder
        assert "role=alert" in parts.message.value and parts.grid.children == ()
        assert "image/png" in panel._repr_mimebundle_()[0]
