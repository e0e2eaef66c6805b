"COCO from a server on this machine that fails: what arrives is whole, and the next run goes on."

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from unreliable_server import UnreliableServer

import clip475.data.download as download
from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.data.download import (
    _CAPTION_FILES,
    _fetch_archive,
    _fetch_images,
    _is_whole,
    _Patience,
    _Source,
    _why_no_picture,
    prepare_coco2014,
)
from clip475.data.layouts import read_splits

TRAIN, VAL = list(range(1, 41)), list(range(1001, 1021))
MAIN = Path(__file__).parents[1]


def colour_of(id):
    return (id * 37 % 256, id * 91 % 256, id * 151 % 256)


def file_name(name, id):
    return f"COCO_{name}2014_{id:012d}.jpg"


def write_served(root, train=TRAIN, val=VAL):
    "What images.cocodataset.org has, made up: pictures with a colour of their own, and the archive."
    with zipfile.ZipFile(root / "annotations_trainval2014.zip", "w") as z:
        z.writestr("annotations/instances_val2014.json", "{}")
        z.writestr("../outside.txt", "never")
        for name, ids in (("train", train), ("val", val)):
            (root / f"{name}2014").mkdir()
            for id in ids:
                Image.new("RGB", (48, 32), colour_of(id)).save(
                    root / f"{name}2014" / file_name(name, id), quality=95
                )
            said = [(id, k) for id in ids for k in range(5 + id % 3)]
            z.writestr(
                f"annotations/captions_{name}2014.json",
                json.dumps(
                    {
                        "images": [{"id": id, "file_name": file_name(name, id)} for id in ids],
                        "annotations": [
                            {"id": 10 * id + k, "image_id": id, "caption": f"caption {k} of {id}"}
                            for id, k in said
                        ],
                    }
                ),
            )
    return hashlib.md5((root / "annotations_trainval2014.zip").read_bytes()).hexdigest()


class Server(UnreliableServer):
    "The unreliable server, with its source and a folder to prepare."

    def __init__(self, folder):
        self.md5 = write_served(folder)
        super().__init__(folder)
        self.source = _Source(
            f"{self.url}/annotations_trainval2014.zip", self.md5, self.url + "/{folder}/{file}", 10**5, 10**4
        )

    def picture_requests(self):
        return {name: n for name, n in self.asked.items() if name.endswith(".jpg")}


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        yield server


@pytest.fixture
def root(tmp_path):
    return tmp_path / "coco"


def config(**changes):
    return LabConfig.from_preset("tiny", **{"train_images": 20, "val_images": 8, **changes})


def quick(**changes):
    return _Patience(**{"tries": 4, "timeout": 5, "workers": 8, "sleep": lambda seconds: None, **changes})


def prepare(root, server, patience=None, **changes):
    return prepare_coco2014(root, config(**changes), False, server.source, patience or quick())


def refusal(fn, *args, **kwargs):
    with pytest.raises(LabError) as caught:
        fn(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 700
    return message


def check(root, config):
    "Every picture has its own captions, nothing half written, nothing outside."
    splits = read_splits(root, config)
    for split in splits:
        for row, (id, path) in enumerate(zip(split.image_ids.tolist(), split.image_paths)):
            assert np.abs(np.array(Image.open(path)).mean((0, 1)) - colour_of(id)).max() < 4
            assert split.captions_of(row) == [f"caption {k} of {id}" for k in range(5 + id % 3)]
    assert not list(root.rglob(".*part*")) and not list(root.parent.rglob("outside.txt"))
    return splits


# all goes well


def test_exactly_the_drawn_pictures_are_fetched_once(server, root, capfd):
    record = prepare(root, server, test_images=4)
    drawn = [id for e in record["splits"].values() for id in e["ids"]]
    assert len(set(drawn)) == 32 and set(server.picture_requests()) == {p.name for p in root.rglob("*.jpg")}
    assert {int(n[-16:-4]) for n in server.picture_requests()} == set(drawn) and set(
        server.asked.values()
    ) == {1}
    assert sorted(p.name for p in (root / "annotations").iterdir()) == sorted(_CAPTION_FILES) and not list(
        root.glob("*.zip")
    )
    assert record == json.loads((root / "split.json").read_text())
    splits = check(root, config(test_images=4))
    assert [s.fingerprint for s in splits] == [e["fingerprint"] for e in record["splits"].values()]
    assert capfd.readouterr() == ("", "")


def test_a_second_run_asks_for_nothing(server, root):
    first = prepare(root, server)
    server.asked.clear()
    assert prepare(root, server) == first and not server.asked


def test_the_draw_does_not_depend_on_the_folder(server, root, tmp_path):
    whole = prepare(tmp_path / "whole", server, train_images=None, val_images=None)
    assert whole["splits"]["train"]["ids"] == TRAIN
    small = prepare(tmp_path / "whole", server)
    assert small == prepare(root, server)
    (tmp_path / "whole" / "split.json").unlink()
    assert [s.image_ids.tolist() for s in read_splits(tmp_path / "whole", config())] == [
        e["ids"] for e in small["splits"].values()
    ]
    larger = prepare(root, server, train_images=30)
    assert (
        set(small["splits"]["train"]["ids"]) < set(larger["splits"]["train"]["ids"])
        and larger["splits"]["val"] == small["splits"]["val"]
    )


def test_progress_goes_to_stderr(server, root, capfd):
    prepare_coco2014(root, config(), True, server.source, quick())
    out, err = capfd.readouterr()
    assert out == "" and "pictures" in err and "28/28" in err and "annotations_trainval2014.zip" in err


# the network misbehaves, for a while


@pytest.mark.parametrize("mood", ["drop", "cut", "html", 500, 503, 429, 408])
def test_what_passes_is_waited_for(server, root, mood):
    for id in TRAIN[::3]:
        server.faults[file_name("train", id)] = [mood] * 3
    server.faults["annotations_trainval2014.zip"] = [mood] * 2 if mood != "html" else []
    prepare(root, server)
    check(root, config())
    asked = server.picture_requests()
    assert all(asked[name] == (4 if name in server.faults else 1) for name in asked)


def test_retry_after_is_honoured_and_pauses_double_with_jitter(server, tmp_path):
    name, waited = file_name("train", 1), []
    server.faults[name] = [429, 500, 500, 500, 500]
    patience = quick(tries=6, pause=2, sleep=waited.append)
    assert not _fetch_images({tmp_path / name: f"{server.url}/train2014/{name}"}, patience, False)
    assert waited[0] == 7 and all(2**k <= w <= 2 ** (k + 1) for k, w in enumerate(waited) if k > 0)


def test_a_wish_for_an_hour_is_not_waited_for(server, tmp_path):
    name, waited = file_name("train", 1), []
    server.faults[name] = 429
    failed = _fetch_images(
        {tmp_path / name: f"{server.url}/train2014/{name}"}, quick(longest=5, sleep=waited.append), False
    )
    assert (
        failed[tmp_path / name] == "the server says 429 and wants to be left alone for 7 s"
        and not waited
        and server.asked[name] == 1
    )


def test_a_slow_answer_is_cut_off(server, tmp_path, monkeypatch):
    name, clock = file_name("train", 1), iter([0, 200])  # seconds at the start of the body and after a piece
    monkeypatch.setattr(download, "time", SimpleNamespace(monotonic=lambda: next(clock, 0)))
    assert not _fetch_images({tmp_path / name: f"{server.url}/train2014/{name}"}, quick(), False)
    assert server.asked[name] == 2 and _is_whole(tmp_path / name)


def test_a_server_that_never_answers(server, tmp_path):
    name, server.answers_left = file_name("train", 1), 0
    failed = _fetch_images(
        {tmp_path / name: f"{server.url}/train2014/{name}"}, quick(tries=2, timeout=0.1), False
    )
    assert failed == {tmp_path / name: "the server does not answer in time, 2 times"} and not list(
        tmp_path.glob("*.jpg")
    )


def test_nobody_listens(tmp_path):
    failed = _fetch_images({tmp_path / "a.jpg": "http://127.0.0.1:9/a.jpg"}, quick(tries=2), False)
    assert failed == {tmp_path / "a.jpg": "no connection to the server, 2 times"}


# for good


@pytest.mark.parametrize(
    "mood, reason",
    [
        (404, "the server says 404"),
        ("html", "it is a web page, 4 times"),
        ("cut", "4 times"),
        ("drop", "the connection broke, 4 times"),
    ],
)
def test_fail_names_the_first_and_goes_on_later(server, root, mood, reason):
    with_all = prepare(root.parent / "first", server)
    ids = with_all["splits"]["train"]["ids"][:5]
    for id in ids:
        server.faults[file_name("train", id)] = mood
    message = refusal(prepare, root, server)
    assert (
        message.startswith("5 of 28 pictures cannot be had")
        and reason in message
        and "; …" in message
        and "--on-bad replace" in message
    )
    assert all(file_name("train", id) in message for id in ids[:3]) and not (root / "split.json").exists()
    assert len(list(root.rglob("*.jpg"))) == 23 and all(map(_is_whole, root.rglob("*.jpg")))
    server.faults.clear()
    server.asked.clear()
    assert prepare(root, server) == with_all and len(server.picture_requests()) == 5
    check(root, config())


def test_replace_takes_the_next_of_the_order_and_records_it(server, root):
    before = prepare(root.parent / "first", server, test_images=4)["splits"]
    gone = {
        "train": before["train"]["ids"][:2],
        "val": before["val"]["ids"][3:4],
        "test": before["test"]["ids"][-1:],
    }
    for name, ids in gone.items():
        for id in ids:
            server.faults[file_name("train" if name == "train" else "val", id)] = 404
    after = prepare(root, server, test_images=4, on_bad="replace")
    for name, ids in gone.items():
        assert (
            set(before[name]["ids"]) - set(after["splits"][name]["ids"]) == set(ids)
            and after["splits"][name]["images"] == before[name]["images"]
        )
    assert {(b["split"], b["id"], b["reason"]) for b in after["bad"]} == {
        (name, id, "the server says 404") for name, ids in gone.items() for id in ids
    }
    check(root, config(test_images=4))
    server.asked.clear()
    assert prepare(root, server, test_images=4, on_bad="replace") == after and not server.asked  # remembered
    assert prepare(root, server, test_images=4) == after and not server.asked


def test_a_replacement_that_is_gone_too(server, root):
    more = prepare(root.parent / "first", server, train_images=30)["splits"]["train"]["ids"]
    few = prepare(root.parent / "first", server)["splits"]["train"]["ids"]
    gone = few[:1] + [id for id in more if id not in few][:6]
    for id in gone:
        server.faults[file_name("train", id)] = 404
    after = prepare(root, server, on_bad="replace")
    assert after["splits"]["train"]["images"] == 20 and not set(after["splits"]["train"]["ids"]) & set(gone)


def test_no_replacement_is_left(server, root):
    server.faults[file_name("train", TRAIN[5])] = 404
    message = refusal(prepare, root, server, train_images=40, on_bad="replace")
    assert "40 train images are asked for, but 39 of the 40" in message


def test_a_server_that_has_moved_gives_one_sentence(server, root):
    for id in TRAIN + VAL:
        server.faults[file_name("train" if id in TRAIN else "val", id)] = 404
    for on_bad in ("fail", "replace"):
        message = refusal(prepare, root, server, quick(hopeless=10), on_bad=on_bad)
        assert "may be down or have moved" in message and "the server says 404" in message
    assert sum(server.picture_requests().values()) < 56 and not list(root.rglob("*.jpg"))


def test_an_archive_that_is_another(server, root):
    source = _Source(server.source.archive, "0" * 32, server.source.images, 10**5, 10**4)
    message = refusal(prepare_coco2014, root, config(), False, source, quick())
    assert (
        server.md5 in message
        and "thrown away" in message
        and [p for p in root.rglob("*") if p.is_file()] == []
    )
    server.faults["annotations_trainval2014.zip"] = 404
    assert "the server says 404" in refusal(prepare, root, server)


def test_an_archive_with_the_right_hash_and_without_captions(server, root):
    path = server.folder / "annotations_trainval2014.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("annotations/instances_val2014.json", "{}")
    source = _Source(
        server.source.archive, hashlib.md5(path.read_bytes()).hexdigest(), server.source.images, 10**5, 10**4
    )
    assert "not COCO's annotation archive" in refusal(
        prepare_coco2014, root, config(), False, source, quick()
    )
    assert not list((root / "annotations").glob("*"))


def test_a_partial_archive_is_completed_not_fetched_again(server, root):
    whole = (server.folder / "annotations_trainval2014.zip").read_bytes()
    root.mkdir()
    (root / ".annotations_trainval2014.zip.part").write_bytes(whole[:1000])
    prepare(root, server)
    check(root, config())
    (root / ".a.zip.part").write_bytes(whole)  # complete, but never renamed
    _fetch_archive(server.source.archive, root / "a.zip", server.md5, quick(), False)
    assert (root / "a.zip").read_bytes() == whole
    (root / ".b.zip.part").write_bytes(b"x" * 1000)  # of something else
    assert "thrown away" in refusal(
        _fetch_archive, server.source.archive, root / "b.zip", server.md5, quick(), False
    )
    _fetch_archive(server.source.archive, root / "b.zip", server.md5, quick(), False)
    assert (root / "b.zip").read_bytes() == whole


def test_a_full_disk_is_told_before(server, root, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 250_000}))
    message = refusal(prepare, root, server)
    assert "free some space" in message and not server.picture_requests()


def test_a_disk_that_fills_up(server, root, monkeypatch):
    real, written = download._atomic_path, []

    def filling(path):
        written.append(path)
        if len(written) > 5:
            raise OSError(28, "No space left on device", str(path))
        return real(path)

    monkeypatch.setattr(download, "_atomic_path", filling)
    message = refusal(prepare, root, server)
    assert "No space left on device" in message and all(map(_is_whole, root.rglob("*.jpg")))
    monkeypatch.undo()
    prepare(root, server)
    check(root, config())


def test_a_root_that_is_a_file(server, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "name another one with --root" in refusal(prepare, tmp_path / "file", server)


def test_an_archive_that_cannot_be_written(server, root):
    (root / ".a.zip.part").mkdir(parents=True)
    assert "it cannot be written" in refusal(
        _fetch_archive, server.source.archive, root / "a.zip", server.md5, quick(), False
    )


# what lies there already


def test_broken_files_are_fetched_again_and_whole_ones_are_not(server, root):
    prepare(root, server)
    paths = sorted((root / "train2014").iterdir())
    whole = paths[0].read_bytes()
    for path, content in zip(paths, (b"", whole[: len(whole) // 2], b"<html>", whole[:-2])):
        path.write_bytes(content)
    server.asked.clear()
    prepare(root, server)
    assert set(server.picture_requests()) == {p.name for p in paths[:4]}
    check(root, config())


def test_other_files_are_left_alone_and_old_leftovers_go(server, root):
    (root / "train2014").mkdir(parents=True)
    (root / "train2014" / "mine.jpg").write_text("mine")
    old, young = root / "train2014" / ".part-1-abc-x.jpg", root / ".part-2-abc-y.json"
    for part in (old, young):
        part.write_text("half")
    os.utime(old, (0, 0))
    prepare(root, server)
    assert (root / "train2014" / "mine.jpg").read_text() == "mine" and not old.exists() and young.exists()


@pytest.mark.parametrize("content", ["{", '{"format": 2}', "[]", '{"bad": 3, "seed": 42}'])
def test_a_damaged_record_is_refused(server, root, content):
    prepare(root, server)
    (root / "split.json").write_text(content)
    assert "split.json" in refusal(read_splits, root, config())
    assert "split.json" in refusal(prepare, root, server)


# interrupted


def test_an_interrupt_leaves_whole_pictures_and_the_next_run_goes_on(server, root):
    def interrupt(seconds):
        raise KeyboardInterrupt

    expected = prepare(root.parent / "first", server)
    server.asked.clear()
    server.faults[file_name("train", expected["splits"]["train"]["ids"][11])] = [500]
    with pytest.raises(KeyboardInterrupt):
        prepare(root, server, quick(workers=2, sleep=interrupt))
    there = {p.name for p in root.rglob("*.jpg")}
    assert (
        0 < len(there) < 28 and all(map(_is_whole, root.rglob("*.jpg"))) and not list(root.rglob(".*part*"))
    )
    server.asked.clear()
    assert (
        prepare(root, server) == expected
        and not there & set(server.asked)
        and len(server.picture_requests()) == 28 - len(there)
    )
    assert threading.active_count() < 20


RUN = """
import sys
from clip475.core.config import LabConfig
from clip475.data.download import _Patience, _Source, prepare_coco2014
root, url, md5 = sys.argv[1:]
source = _Source(url + "/annotations_trainval2014.zip", md5, url + "/{folder}/{file}", 10**5, 10**4)
config = LabConfig.from_preset("tiny", train_images=20, val_images=8)
prepare_coco2014(root, config, False, source, _Patience(workers=2))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, getattr(signal, "SIGKILL", signal.SIGTERM)])
def test_a_killed_process(server, root, how):
    server.answers_left = 10  # the archive and nine pictures
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(root), server.url, server.md5],
        cwd=MAIN,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(list(root.rglob("COCO_*.jpg"))) < 5 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(how)
    server.released.set()
    stderr = process.communicate()[1]
    assert process.returncode != 0 and ("KeyboardInterrupt" in stderr or how != signal.SIGINT), stderr
    whole = list(root.rglob("COCO_*.jpg"))  # a picture under way has a name that begins with a dot
    there = {p.name for p in whole}
    assert 5 <= len(there) < 28 and all(map(_is_whole, whole))
    server.answers_left = None
    server.asked.clear()
    prepare(root, server)
    assert not there & set(server.asked) and sum(server.asked.values()) == 28 - len(there)
    for part in root.rglob(".part*"):
        part.unlink()
    check(root, config())


# what a picture is


def test_what_is_no_picture(tmp_path):
    good = (lambda b: (Image.new("RGB", (40, 30), (9, 99, 200)).save(b, "JPEG"), b.getvalue())[1])(
        io.BytesIO()
    )
    assert _why_no_picture(good) is None
    for data, reason in (
        (b"", "empty"),
        (b"  <!doctype html>", "web page"),
        (good[:-20], "decode"),
        (good[:30], "decode"),
        (b"\xff\xd8\xff", "decode"),
        (bytes(99), "decode"),
    ):
        assert reason in _why_no_picture(data)
        (tmp_path / "x.jpg").write_bytes(data)
        assert not _is_whole(tmp_path / "x.jpg")
    assert not _is_whole(tmp_path) and not _is_whole(tmp_path / "nothing.jpg")
    Image.new("L", (5, 5)).save(tmp_path / "a.png")
    assert _is_whole(tmp_path / "a.png")


def test_a_bomb_is_no_picture(monkeypatch):
    monkeypatch.setattr(download, "_MOST_PIXELS", 1000)
    b = io.BytesIO()
    Image.new("RGB", (40, 30)).save(b, "JPEG")
    assert _why_no_picture(b.getvalue()) == "it claims to have 40 × 30 pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "too many pixels" in _why_no_picture(b.getvalue())
