"""A small web server on this machine that tests download from."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """A server of one file under every name, or of several, and how it behaves. Runs inside a `with`."""

    def __init__(self, content=b""):
        self.content = content
        self.files = {}  # content by path; none: every path is `content`
        self.headers = {"ETag": '"first"'}
        self.has_ranges = True
        self.redirect_to = None
        self.failures = []  # status codes that the next requests get
        self.cuts = []  # the next bodies end after so many bytes
        self.pause_seconds = 0.0  # in the middle of every body
        self.hangs = False  # a cut body stays open, silent, until the client gives up
        self.requests = []  # the headers of each
        self.paths = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._make_handler())
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.address}/weights.pth"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def _make_handler(site):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append(dict(self.headers))
                site.paths.append(self.path)
                with contextlib.suppress(ConnectionError):  # the client may leave early
                    site.respond(self)

            def log_message(self, *args):
                pass

        return Handler

    def respond(self, handler):
        if self.failures or self.redirect_to:
            handler.send_response(self.failures.pop(0) if self.failures else 302)
            handler.send_header("Location", self.redirect_to or "")
            handler.end_headers()
            return
        content = self.files.get(handler.path) if self.files else self.content
        if content is None:
            handler.send_error(404)
            return
        start = self._find_start(handler.headers)
        if start and start >= len(content):
            handler.send_error(416)
            return
        body = content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in {"Content-Length": str(len(body)), **self.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        self._send(handler, body, self.cuts.pop(0) if self.cuts else len(body))

    def _find_start(self, headers):
        is_same = headers["If-Range"] in self.headers.values()
        if not (self.has_ranges and "Range" in headers and is_same):
            return 0
        return int(headers["Range"].removeprefix("bytes=").removesuffix("-"))

    def _send(self, handler, body, length):
        handler.wfile.write(body[: length // 2])
        time.sleep(self.pause_seconds)
        handler.wfile.write(body[length // 2 : length])
        if self.hangs and length < len(body):
            handler.connection.recv(1)
