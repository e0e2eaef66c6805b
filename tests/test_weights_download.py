"torchvision's weights from a server on this machine that fails on demand."

import hashlib
from types import SimpleNamespace

import pytest
import torch
from hub_server import Hub

from clip475.core.files import LabError
from clip475.data.download import _Patience
from clip475.models import backbones
from clip475.models.backbones import _torchvision_weights


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A server with one file of weights, whose name ends as torchvision's do."
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save({"weight": torch.arange(50_000.0)}, folder / "w")
    digits = hashlib.sha256((folder / "w").read_bytes()).hexdigest()[:8]
    file = (folder / "w").rename(folder / f"net-{digits}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(backbones, "_PATIENCE", _Patience(tries=2, sleep=lambda seconds: None))
    with Hub(folder) as hub:
        url = f"{hub.url}/x/resolve/main/{file.name}"
        entry = SimpleNamespace(name="V1", url=url, meta={"_file_size": 0.2})
        monkeypatch.setattr(backbones.torchvision.models, "get_model_weights", lambda name: [entry])
        hub.file, hub.cached = file, tmp_path / "torch/hub/checkpoints" / file.name
        yield hub
        hub.shutdown()


def fetch():
    return _torchvision_weights("resnet18", "V1")["weight"]


def refusal():
    with pytest.raises(LabError, match="did not come from http") as caught:
        fetch()
    assert "\n" not in str(caught.value) and "TORCH_HOME" in str(caught.value)
    return str(caught.value)


def test_weights_come_once_with_their_size_said_first(server, capsys):
    assert fetch().equal(torch.arange(50_000.0))
    captured = capsys.readouterr()
    assert not captured.out and "0 MB are fetched once" in captured.err and server.file.name in captured.err
    asked = server.asked
    assert len(fetch()) == 50_000 and server.asked == asked


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_that_refuses_is_one_sentence(server, status):
    server.status = status
    assert f"the server says {status}" in refusal() and server.asked <= 2
    server.status = 200
    assert len(fetch()) == 50_000


def test_without_a_network(server):
    server.shutdown()
    server.server_close()
    assert "no connection" in refusal() and not server.cached.exists()


def test_a_download_that_breaks_off_goes_on_where_it_was(server, monkeypatch):
    monkeypatch.setattr(backbones, "_PATIENCE", _Patience(tries=1, sleep=lambda seconds: None))
    server.cut = server.file.name
    assert refusal() and not server.cached.exists()
    server.cut, server.sent = "", {}
    assert len(fetch()) == 50_000
    assert server.sent[server.file.name] < server.file.stat().st_size  # only the rest


def test_other_bytes_than_the_name_says_are_thrown_away(server):
    right = server.file.read_bytes()
    server.file.write_bytes(b"\x55" * len(right))
    assert "another SHA-256" in refusal()
    assert not [path for path in server.cached.parent.iterdir()]
    server.file.write_bytes(right)
    assert len(fetch()) == 50_000


def test_a_file_that_changed_later_is_fetched_again(server, capsys):
    fetch()
    with server.cached.open("r+b") as f:
        f.seek(1000)
        f.write(b"\x55" * 1000)
    assert fetch().equal(torch.arange(50_000.0))
    assert "has changed since" in capsys.readouterr().err
