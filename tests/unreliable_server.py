"A server on this machine that fails on demand, for the tests of downloads."

from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread


class UnreliableServer(ThreadingHTTPServer):
    """Serves `folder` to this machine alone, and fails on demand; `url` is its address. Use it in a `with`.

    `faults[name]` is a list of faults for the next requests for a file, or one fault for all of them:
    a status such as 500, "cut", "drop", "html", "fine", or a function of the handler that answers.
    After `answers_left` answers all further requests wait until the server ends or `released` is set, and are
    then dropped: so a test finds the client in the middle, however busy the machine is. `asked` counts the
    requests for each name."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = Path(folder)
        self.answers_left = None  # None: without end
        self.released = Event()
        self.faults = {}
        self.asked = Counter()
        self.lock = Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def next_fault(self, name):
        if self.is_closed():
            self.released.wait()
            return "drop"
        with self.lock:
            self.asked[name] += 1
            fault = self.faults.get(name, "fine")
            if isinstance(fault, list):
                return fault.pop(0) if fault else "fine"
            return fault

    def is_closed(self):
        with self.lock:
            if self.answers_left is None:
                return False
            self.answers_left -= 1
            return self.answers_left < 0

    def handle_error(self, request, client):
        pass  # a client that closed the connection

    def __exit__(self, *args):
        self.released.set()
        self.shutdown()
        super().__exit__(*args)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        fault = self.server.next_fault(self.path.rpartition("/")[2])
        file = self.server.folder / self.path.lstrip("/")
        if callable(fault):
            fault(self)
        elif fault == "drop":
            self.close_connection = True
        elif fault == "html":
            self.answer(200, b"<html>Please log in</html>")
        elif isinstance(fault, int):
            self.answer(fault)
        elif ".." in self.path or not file.is_file():
            self.answer(404)
        else:
            self.answer(200, file.read_bytes(), fault)

    def answer(self, status, body=b"", fault="fine"):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if status == 200 else 0
        self.send_response(206 if start else status)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if status in (429, 503):
            self.send_header("Retry-After", "7")
        self.send_header("Content-Length", len(body) - start)
        self.end_headers()
        self.close_connection = fault != "fine"
        end = (start + len(body)) // 2 if fault == "cut" else None
        self.wfile.write(body[start:end])
