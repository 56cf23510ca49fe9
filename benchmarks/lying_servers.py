"""Servers with wrong responses: wrong lengths, wrong ranges, endless bodies, cut connections. Part of `make faults`."""

import contextlib
import hashlib
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finestsam.errors import UserError
from finestsam.runtime import download as downloading

if TYPE_CHECKING:
    from benchmarks.faults import Findings

BODY_BYTES = 300_000
ENDLESS_BYTES = 50_000_000  # of an endless body; a client that reads this much has no limit
SECONDS_FOR_ONE = 30
LIES = (
    "none", "length too long", "length too short", "length negative", "length no number", "no length", "endless",
    "other bytes", "other start", "range of nothing", "206 without range", "200 to a range", "416", "cut", "garbage",
    "redirect to itself", "empty", "500",
)  # fmt: skip


class Liar:
    """A server that sends the given wrong responses in order, and then correct ones."""

    def __init__(self, body: bytes, lies: list[str]):
        self.body, self.lies, self.sent = body, list(lies), 0
        liar = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    liar.respond(self, liar.lies.pop(0) if liar.lies else "none")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/weights.pth"

    def __enter__(self) -> "Liar":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def respond(self, handler: BaseHTTPRequestHandler, lie: str) -> None:
        wanted = handler.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").rstrip("-") or 0) if wanted else 0
        is_part = bool(wanted) and lie != "200 to a range"
        body = self.body[start:] if is_part else self.body
        if lie == "garbage":
            handler.wfile.write(b"\xff\x00 not http\r\n\r\n" * 9)
            return
        if lie in ("500", "416", "redirect to itself"):
            handler.send_response({"500": 500, "416": 416}.get(lie, 302))
            handler.send_header("Location", self.url)
            handler.end_headers()
            return
        handler.send_response(206 if is_part or lie in ("other start", "206 without range") else 200)
        if is_part or lie in ("other start", "range of nothing"):
            first = {"other start": start + 1000, "range of nothing": len(self.body) + 5}.get(lie, start)
            handler.send_header("Content-Range", f"bytes {first}-{len(self.body) - 1}/{len(self.body)}")
        length = {
            "length too long": str(len(body) + 999), "length too short": str(len(body) // 2), "length negative": "-5",
            "length no number": "x", "empty": "0", "no length": None, "endless": None,
        }.get(lie, str(len(body)))  # fmt: skip
        if length is not None:
            handler.send_header("Content-Length", length)
        handler.send_header("ETag", '"one"')
        handler.end_headers()
        if lie == "endless":
            while self.sent < ENDLESS_BYTES:
                handler.wfile.write(bytes(1 << 16))
                self.sent += 1 << 16
            return
        body = b"" if lie == "empty" else body[: len(body) // 3] if lie == "cut" else body
        handler.wfile.write(bytes(len(body)) if lie == "other bytes" else body)


def try_servers(folder: Path, findings: "Findings", generator: np.random.Generator, count: int) -> str:
    """Download from servers with a few wrong responses. The file must arrive complete, or one line must say why not."""
    body = generator.bytes(BODY_BYTES)
    digest = hashlib.sha256(body).hexdigest()
    outcomes, slowest = Counter(), 0.0
    pauses, downloading.PAUSES_SECONDS = downloading.PAUSES_SECONDS, (0, 0, 0)
    for number in range(count):
        lies = [LIES[number % len(LIES)], *(str(lie) for lie in generator.choice(LIES, generator.integers(0, 5)))]
        is_known = bool(generator.integers(2))
        target = folder / "servers" / str(number) / "weights.pth"
        start = time.monotonic()
        with Liar(body, lies) as liar:
            try:
                downloading.download(liar.url, target, digest if is_known else None, BODY_BYTES if is_known else None)
                outcome = "whole"
            except UserError as error:
                outcome = "refused"
                findings.expect("\n" not in str(error), f"servers {lies}: {error}")
            except Exception as error:  # any other exception is a bug to report
                outcome = type(error).__name__
                findings.expect(False, f"servers {lies}: {error!r}")
            # Without a hash, a client cannot notice these responses.
            undetectable = {"other bytes", "length too short", "empty", "no length", "endless"}
            is_detectable = not undetectable & {*lies}
            if outcome == "whole" and (is_known or is_detectable):
                findings.expect(target.read_bytes() == body, f"servers {lies}: a wrong file arrived")
            findings.expect(outcome == "whole" or not target.exists(), f"servers {lies}: the target is incomplete")
            if is_known:
                findings.expect(
                    liar.sent < ENDLESS_BYTES, f"servers {lies}: took {liar.sent:,} bytes of an endless body"
                )
        seconds = time.monotonic() - start
        slowest = max(slowest, seconds)
        findings.expect(seconds < SECONDS_FOR_ONE, f"servers {lies}: {seconds:.0f} s")
        outcomes[outcome] += 1
    downloading.PAUSES_SECONDS = pauses
    shown = ", ".join(f"{amount} x {outcome}" for outcome, amount in sorted(outcomes.items()))
    return f"{count} lying servers: {shown}; slowest {slowest:.1f} s"
