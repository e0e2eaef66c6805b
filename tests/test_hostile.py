"Hostile files, servers and terminals: each fault gets a sentence, and nothing reaches the terminal raw."

import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import urllib3
from PIL import Image
from unreliable_server import UnreliableServer

import clip475.app.cli as cli
import clip475.data.download as download
from clip475.app.cli import _listing, _parser, _Verb
from clip475.core.config import LabConfig
from clip475.core.files import LabError, _visible, read_json, write_json, write_text
from clip475.data.download import (
    _COCO2014,
    _fetch_archive,
    _fetch_images,
    _network_failure,
    _Patience,
    _request,
    _Unavailable,
    _why_no_picture,
)
from clip475.data.scenes import _prepare_scenes

STEERS = "\x1b]0;a title\x07\x1b[2J \x9b31m \x7f \u202eeht \u2066 \ud83d \udcff"  # ESC, OSC, C1, bidi, halves


def is_safe(text: str) -> bool:
    "Whether a terminal shows `text` and does nothing else."
    return text.isprintable() and _visible(text) == text


# what is shown


def test_what_steers_a_terminal_is_written_out():
    assert is_safe(_visible(STEERS)) and "\\x1b]0;a title\\x07" in _visible(STEERS)
    for kept in ("plain", "é ü 漢字 عربى", "🙂 👩‍🚀", "back\\slash", ""):
        assert _visible(kept) == kept
    assert _visible("a\tb\nc\rd") == "a\\tb\\nc\\rd" and _visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_a_message_shows_the_name_of_a_file_and_does_not_obey_it():
    assert is_safe(str(LabError(f"{STEERS}.json: there is no such file")))
    assert str(LabError("two\nlines")) == "two\nlines"


# what is written and read


def test_half_an_emoji_is_written_and_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"captions": [STEERS, "é 🙂"]})
    assert read_json(tmp_path / "a.json") == {"captions": [STEERS, "é 🙂"]}
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert is_safe(text.replace("\n", "")) and "é 🙂" in text
    write_text(tmp_path / "a.md", "half: \ud83d")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "half: \\ud83d"


@pytest.mark.parametrize(
    "content, problem",
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"id": %s}' % ("7" * 5_000), "thousands of digits"),
        (json.dumps({"id": 1})[:-1], "line 1"),
    ],
    ids=["lists", "objects", "digits", "cut"],
)
def test_json_that_python_cannot_take(tmp_path, content, problem):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(LabError, match=problem) as caught:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value) and len(str(caught.value)) < 300


# a server that lies


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "served" / "a.jpg")
    (tmp_path / "served" / "a.zip").write_bytes(bytes(range(256)) * 100)
    with UnreliableServer(tmp_path / "served") as server:
        yield server


def answer(status=200, body=b"", **headers):
    "A function that gives this answer to a request, with headers as they are."

    def send(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body)

    return send


def patience(**changes):
    return _Patience(**{"tries": 3, "timeout": 60, "sleep": lambda seconds: None, **changes})


def fetch(server, tmp_path, **changes):
    "Fetch a.jpg; the reason why it cannot be had, or None."
    path = tmp_path / "got" / "a.jpg"
    return _fetch_images({path: f"{server.url}/a.jpg"}, patience(**changes), False).get(path)


def picture(form, size=(40, 30), mode="RGB"):
    data = io.BytesIO()
    Image.new(mode, size).save(data, form)
    return data.getvalue()


@pytest.mark.parametrize(
    "fault, reason",
    [
        (answer(Content_Length="196000000", body=b"x"), "the server sends more than 10 MB"),
        (answer(body=b"x" * 10_000_001), "the server sends more than 10 MB"),  # it does not say how much
        (answer(302, Location="/a.jpg", Content_Length="0"), "in a circle"),
        (answer(302, Location="ftp://[", Content_Length="0"), "an address that is none"),
        (answer(200, picture("PNG", (6000, 5000), "1")), "it claims to have 6,000 × 5,000 pixels, 3 times"),
    ],
    ids=["says it is large", "is large", "circle", "no address", "many pixels"],
)
def test_a_picture_that_is_not_taken(server, tmp_path, fault, reason):
    server.faults["a.jpg"] = fault
    assert reason in fetch(server, tmp_path) and not list((tmp_path / "got").rglob("*.jpg"))


@pytest.mark.parametrize("wish", ["9" * 5_000, "Fri, 31 Dec 99999 23:59:59 GMT", "-5", "soon"])
def test_a_wish_to_wait_that_cannot_be_read(server, tmp_path, wish):
    server.faults["a.jpg"] = [answer(503, Retry_After=wish, Content_Length="0")]
    assert fetch(server, tmp_path) is None and server.asked["a.jpg"] == 2


def test_a_wish_to_wait_for_centuries(server, tmp_path):
    server.faults["a.jpg"] = answer(429, Retry_After="9" * 400, Content_Length="0")
    assert fetch(server, tmp_path) == "the server says 429 and wants to be left alone for 21600 s"


def test_a_length_that_is_no_number(server, tmp_path):
    zipped = (server.folder / "a.zip").read_bytes()
    server.faults["a.jpg"] = answer(Content_Length="abc", body=(server.folder / "a.jpg").read_bytes())
    server.faults["a.zip"] = answer(Content_Length="abc", body=zipped)
    assert fetch(server, tmp_path) is None
    _fetch_archive(
        f"{server.url}/a.zip", tmp_path / "a.zip", hashlib.md5(zipped).hexdigest(), patience(), False
    )
    assert (tmp_path / "a.zip").read_bytes() == zipped


def test_an_archive_that_is_cut_each_time_and_begins_anew_each_time(server, tmp_path):
    zipped = (server.folder / "a.zip").read_bytes()
    server.faults["a.zip"] = answer(Content_Length=str(len(zipped)), body=zipped[:5_000])
    md5, args = hashlib.md5(zipped).hexdigest(), (patience(), False)
    with pytest.raises(LabError, match="the connection broke, 3 times"):
        _fetch_archive(f"{server.url}/a.zip", tmp_path / "a.zip", md5, *args)
    assert server.asked["a.zip"] == 3
    server.faults["a.zip"] = [answer(Content_Length=str(len(zipped)), body=zipped[:4_000])]
    _fetch_archive(f"{server.url}/a.zip", tmp_path / "a.zip", md5, *args)
    assert (tmp_path / "a.zip").read_bytes() == zipped


def test_an_archive_without_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_MOST_ARCHIVE_BYTES", 20_000)
    with pytest.raises(LabError, match="the server sends more than"):
        _fetch_archive(f"{server.url}/a.zip", tmp_path / "a.zip", "", patience(), False)


def test_a_way_out_of_encryption_is_not_taken():
    closed = []
    response = SimpleNamespace(
        geturl=lambda: "http://a.org/a.jpg", close=lambda: closed.append(1), status=200
    )
    pool = SimpleNamespace(request=lambda *args, **kwargs: response, headers={})
    with pytest.raises(_Unavailable, match="without encryption"):
        _request(pool, "https://a.org/a.jpg", 1)
    assert closed and _COCO2014.images.startswith("https:") and _COCO2014.archive.startswith("https:")


def test_a_certificate_that_is_not_accepted_is_no_broken_connection():
    problem = urllib3.exceptions.SSLError("certificate verify failed: self-signed certificate")
    failure = _network_failure(urllib3.exceptions.MaxRetryError(None, "https://a.org", problem))
    assert isinstance(failure, _Unavailable) and "certificate" in str(failure)


def test_a_picture_that_is_a_program_starts_none(monkeypatch):
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n"
    assert _why_no_picture(script) == "it does not decode" and not started
    for form in ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP"):
        assert _why_no_picture(picture(form)) is None


def test_few_pictures_are_decoded_at_a_time(monkeypatch):
    now, most, lock = [0], [0], threading.Lock()

    @contextmanager
    def opened(*args, **kwargs):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        yield SimpleNamespace(width=1, height=1, load=lambda: time.sleep(0.005))
        with lock:
            now[0] -= 1

    monkeypatch.setattr(download.Image, "open", opened)
    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(_why_no_picture, [b"x"] * 64)) == {None}
    assert 1 <= most[0] <= 4


# what a killed process leaves


def test_a_drawing_that_was_killed_is_tidied_up(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path))
    config = LabConfig.from_preset("tiny", train_images=4, val_images=2, image_size=32)
    old, young = tmp_path / ".part-1-abc-scenes", tmp_path / ".part-2-abc-scenes"
    for part in (old, young):
        (part / "train2014").mkdir(parents=True)
        (part / "train2014" / "a.jpg").write_text("half")
    for path in (*old.rglob("*"), old, young):
        os.utime(path, (0, 0))
    _prepare_scenes(config, progress=False)
    assert not old.exists() and (young / "train2014" / "a.jpg").exists()


# the command line


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_an_answer_in_every_encoding(place, monkeypatch, encoding, options):
    found = {"query": f"a → {STEERS}", "results": [], "note": None, "figure": "é.png"}
    verb = _Verb("search", "find", lambda args: (found, _listing(found)))
    monkeypatch.setattr(cli, "_parser", lambda: _parser([verb]))
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    assert cli.main(["search", *options]) == 0
    text = out.getvalue().decode(encoding)
    assert is_safe(text.replace("\n", ""))
    assert json.loads(text) == found if options else "finds:" in text


def test_help_in_ascii():
    done = subprocess.run(
        [sys.executable, "-m", "clip475", "search", "--help"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--plus" in done.stdout and done.stderr == ""


def test_what_a_search_found_stays_in_its_line():
    found = {"rank": 1, "score": 0.5, "file": f"/a/{STEERS}.jpg", "captions": [f"two\nlines {STEERS}"]}
    text = _listing({"query": "a\nb", "results": [found], "note": None, "figure": "a.png"})
    assert len(text.splitlines()) == 3 and is_safe(text.replace("\n", ""))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("argv", [["params"], ["params", "--json"], ["--help"]], ids=" ".join)
def test_an_answer_that_cannot_be_written(place, monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert cli.main(argv) == 2
    sys.stdout.flush()  # as Python does at its end: it does not fail again
    assert "the answer cannot be written (No space left on device)" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_is_gone(place, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        cli.main(["params"])
    sys.stdout.flush()
    assert end.value.code == 1 and capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_training(place, monkeypatch, capsys, number):
    monkeypatch.setattr("clip475.training.batches.prepare_data", lambda *a, **k: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["prepare", "--train", "8", "--val", "4"]) == 130
    assert (
        "clip475: stopped; nothing is half-written, and the same command goes on" in capsys.readouterr().err
    )
    assert signal.getsignal(signal.SIGTERM) == before


def test_towers_come_before_packing(place, capsys):
    code = cli.main(["prepare", "--train", "8", "--val", "4", "--set", "backbone_weights=none.pth"])
    assert code == 2 and "none.pth: there is no such file" in capsys.readouterr().err
    assert not list(place.rglob("*.jpg")) and not list(place.rglob("*.npy"))


@pytest.mark.parametrize("value", ["7" * 5_000, "[" * 100_000])
def test_a_setting_that_is_no_value(place, capsys, value):
    assert cli.main(["params", "--set", f"epochs={value}"]) == 2
    assert "epochs" in capsys.readouterr().err


def run_small(*argv):
    sizes = [
        "--train",
        "32",
        "--val",
        "8",
        "--set",
        "epochs=1",
        "--set",
        "batch_size=16",
        "--set",
        "image_size=32",
    ]
    return cli.main(["train", *([] if "--resume" in argv else sizes), *argv])


@pytest.mark.parametrize("run", ["my run", None])
def test_an_interrupt_after_training_names_the_way_on_and_a_finished_run_is_extended(
    place, monkeypatch, capsys, run
):
    reports = iter([KeyboardInterrupt()])

    def report(*args, **kwargs):
        for problem in reports:
            raise problem

    monkeypatch.setattr("clip475.app.report._finish", report)  # it draws for seconds, and is not tried here
    assert run_small(*(["--run", run] if run else [])) == 130
    advice = capsys.readouterr().err.splitlines()[-1]
    assert advice.startswith(
        "clip475: stopped; nothing is half-written; go on with: clip475 train --resume --run"
    )
    way = shlex.split(advice.partition("go on with: ")[2])
    assert cli.main(way[1:]) == 0 and (place / way[-1] / "split.json").exists()
    if run is None:
        return
    assert run_small("--resume", "--run", run, "--set", "epochs=3") == 0
    captured = capsys.readouterr().err
    assert (
        f"{run}: 3 epochs instead of 1; from step 2 on, the learning rate is that of a run of 3" in captured
    )
    assert LabConfig.load(place / run / "config.json").epochs == 3
    assert len((place / run / "metrics.csv").read_text().splitlines()) == 1 + 3
    assert run_small("--resume", "--run", run) == 0  # finished, and said no more
    assert "instead of" not in capsys.readouterr().err
    for setting in ("epochs=2", "batch_size=8"):
        assert run_small("--resume", "--run", run, "--set", setting) == 2
    assert cli.main(["frozen", "--run", run]) == 2
    assert "holds a run already" in capsys.readouterr().err and not (place / run / "experiment.json").exists()
