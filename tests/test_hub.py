"A tower from the Hugging Face hub, played by a server on this machine that fails on demand."

import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from huggingface_hub import constants

from clip475.core.config import LabConfig
from clip475.core.files import LabError, _note_once
from clip475.data.tokens import _builtin_text_folder, load_tokenizer
from clip475.models.text import load_text_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
NAME, COMMIT = "nobody/tower", "0123456789abcdef0123456789abcdef01234567"
CONFIG = LabConfig.from_preset("tiny", text_model=NAME, text_revision=COMMIT)


class Hub(ThreadingHTTPServer):
    "Serves `folder` as the hub serves a model; `status` answers all requests, `cut` ends one file early."

    daemon_threads, status, cut = True, 200, ""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, 0
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request, client):
        pass  # a client that closed the connection


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked += 1
        file = hub.folder / path.rpartition("/")[2]
        status = hub.status if hub.status != 200 or ("/resolve/" in path and file.is_file()) else 404
        content = file.read_bytes() if status == 200 else b"{}"
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 200:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        elif status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body and file.name == hub.cut:
            self.wfile.write(content[start : len(content) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content[start:])

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(_builtin_text_folder(), folder)
    with Hub(folder) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        server.shutdown()


def weights():
    return [p.clone() for p in load_text_encoder(CONFIG).parameters()]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def refusal(function, *args):
    with pytest.raises(LabError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def blob_of(hub, tmp_path, name):
    digest = hashlib.sha256((hub.folder / name).read_bytes()).hexdigest()
    return tmp_path / "cache" / "models--nobody--tower" / "blobs" / digest


def test_a_tower_comes_once_and_heals_when_its_bytes_change(hub, tmp_path, capsys):
    right = [p.clone() for p in load_text_encoder(LabConfig.from_preset("tiny")).parameters()]
    assert equal(weights(), right) and len(load_tokenizer(NAME, COMMIT)) == 49_408
    asked = hub.asked
    assert equal(weights(), right) and hub.asked == asked  # all of it is here
    blob = blob_of(hub, tmp_path, "model.safetensors")
    for place in (200_000, 0):  # in the numbers, and in the header
        with blob.open("r+b") as f:
            f.seek(place)
            f.write(bytes(16_384))
        _note_once.cache_clear()
        assert equal(weights(), right)
        assert "has changed since it was downloaded" in capsys.readouterr().err


def test_a_damaged_tower_without_a_network_is_refused_and_heals_later(hub, tmp_path):
    right = weights()
    with blob_of(hub, tmp_path, "model.safetensors").open("r+b") as f:
        f.seek(300_000)
        f.write(b"\x55" * 16_384)
    hub.status = 503
    assert "the hub answers 503" in refusal(load_text_encoder, CONFIG)
    hub.status = 200
    assert equal(weights(), right)


@pytest.mark.parametrize(
    "status, says", [(401, "private"), (404, "no such model"), (429, "wait"), (503, "503")]
)
def test_a_hub_that_refuses_is_one_sentence_and_is_asked_once(hub, tmp_path, status, says):
    hub.status = status
    message = refusal(load_text_encoder, CONFIG)
    assert f"the hub answers {status}" in message and says in message and "builtin" in message
    assert hub.asked < 12  # no minutes of trying again
    hub.status = 200
    assert weights()


def test_a_download_that_is_cut_leaves_nothing_that_passes_for_whole(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cut = "model.safetensors"
    assert "did not come from the hub" in refusal(load_text_encoder, CONFIG)
    assert not blob_of(hub, tmp_path, "model.safetensors").exists()
    hub.cut = ""
    right = load_text_encoder(LabConfig.from_preset("tiny")).parameters()
    assert equal(weights(), list(right))


def test_a_file_of_the_hub_that_is_no_tower(hub):
    (hub.folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "text_model" in refusal(load_text_encoder, CONFIG)
