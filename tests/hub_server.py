"The Hugging Face hub, played by a server on this machine that fails on demand."

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `folder` as the hub serves a model, and takes what is pushed into it.

    `status` answers all requests, `cut` ends one file early, `cuts` times. Without `ranges` it gives whole
    files only. `sent` counts the bytes of each file."""

    daemon_threads, status, cut, cuts, ranges = True, 200, "", float("inf"), True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.sent, self.uploaded = folder, 0, {}, {}
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client):
        pass  # a client that closed the connection

    def point_here(self, monkeypatch, cache):
        "Let huggingface_hub take this server for the hub, with its cache in the folder `cache`."
        from huggingface_hub import constants
        from transformers.utils import hub

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(hub, "_hf_api", None, raising=False)  # it would ask the server of an earlier test
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def files(self):
        "Paths of the repository's files."
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def about(self):
        "What the hub says of the repository."
        return {"id": "nobody/tower", "sha": COMMIT, "siblings": [{"rfilename": f} for f in self.files()]}

    def tree(self):
        "Its files with size and checksum."
        entries = []
        for name in self.files():
            content = (self.folder / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append({"type": "file", "path": name, "oid": digest, "size": len(content), "lfs": lfs})
        return entries

    def commit(self, lines):
        "Write the files of a commit: small ones stand in it, large ones were uploaded before."
        for line in map(json.loads, lines):
            about = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(about["content"])
            elif line["key"] == "lfsFile":
                content = self.uploaded[about["oid"]]
            else:
                continue
            file = self.folder / about["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, value, status=200, headers=()):
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (("X-Repo-Commit", COMMIT), *headers):
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked += 1
        if hub.status != 200:
            return self.reply({}, hub.status)
        if re.fullmatch(r"/api/models/[^/]+/[^/]+(/revision/[^/]+)?", path):
            return self.reply(hub.about())
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/[^/]+", path):
            return self.reply(hub.tree())
        file = hub.folder / path.partition("/resolve/")[2].partition("/")[2]
        if "/resolve/" not in path or not file.is_file():
            return self.reply({}, 404, [("X-Error-Code", "EntryNotFound")])
        content = file.read_bytes()
        span = self.headers.get("Range") if hub.ranges else None
        first, _, last = (span or "bytes=0-")[6:].partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if span else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if span:
            span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self.send_header("Content-Range", span)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if file.name == hub.cut and hub.cuts and len(part) > 8:
            hub.cuts -= 1
            part = part[: len(part) // 2]
            self.close_connection = True
        hub.sent[file.name] = hub.sent.get(file.name, 0) + len(part)
        self.wfile.write(part)

    do_GET = do_HEAD = answer

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.uploaded[hashlib.sha256(content).hexdigest()] = content
        self.reply({})

    def do_POST(self):
        hub = self.server
        hub.asked += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if hub.status != 200:
            return self.reply({}, hub.status)
        if self.path == "/api/repos/create":
            return self.reply({"url": f"{hub.url}/nobody/tower", "id": "nobody/tower"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                | {"shouldIgnore": False}
                for f in files
            ]
            return self.reply({"files": modes})
        if self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            where = {"upload": {"href": f"{hub.url}/upload"}}
            return self.reply({"transfer": "basic", "objects": [o | {"actions": where} for o in objects]})
        if "/commit/" in self.path:
            hub.commit(body.splitlines())
        self.reply({"commitUrl": f"{hub.url}/nobody/tower/commit/{COMMIT}", "commitOid": COMMIT})

    def log_message(self, *args):
        pass
