"""Fetch one file over https: continued where it was interrupted, checked as a whole, never half at its place.

Beside the target stand, meanwhile, `.{name}.part` (what came so far), `.{name}.part.version` (the server's mark of the
version that it belongs to) and `.{name}.lock`.
"""

import hashlib
import ipaddress
import os
import re
import ssl
import sys
import time
from contextlib import AbstractContextManager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock, Timeout
from tqdm import tqdm

from finestsam.errors import UserError

PAUSES_SECONDS = (1, 2, 4)  # before each new try
TIMEOUT_SECONDS = 30  # without a byte
BLOCK_BYTES = 1 << 20

DROPPED = (ConnectionError, TimeoutError, ssl.SSLError, HTTPException)
RANGE_NOT_SATISFIABLE = 416
PASSING_CODES = {408, RANGE_NOT_SATISFIABLE, 429, 500, 502, 503, 504}


def download(url: str, target: Path, sha256: str | None, size_bytes: int | None) -> Path:
    """Return `target`, fetched from `url` unless it is already there.

    Of several processes that ask for the same target one fetches it, and the others wait and then use it.

    Args:
        url: https; plain http is for loopback addresses only.
        sha256: what the whole file must have; None: not checked.
        size_bytes: the same.
    """
    if target.is_file():
        return target
    if not _is_allowed(url):
        raise UserError(f"{url}: only https addresses are downloaded")
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target):
            if not target.is_file():
                _fetch(url, part, size_bytes)
                _check(url, part, sha256, size_bytes)
                os.replace(part, target)
                _version_file(part).unlink(missing_ok=True)
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error.reason if type(error) is URLError else error).split())
        by_hand = f"to fetch it by hand, save it as {target}" + (f" (sha256 {sha256})" if sha256 else "")
        raise UserError(f"cannot download {url}: {reason}; {by_hand}") from error
    return target


def _lock(target: Path) -> AbstractContextManager:
    """Wait for and return the lock, which the system frees when its process ends, however it ends."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that downloads {target}", file=sys.stderr)
        return lock.acquire()


def _fetch(url: str, part: Path, size_bytes: int | None) -> None:
    for pause in (*PAUSES_SECONDS, None):
        try:
            return _fetch_rest(url, part, size_bytes)
        except (OSError, HTTPException) as error:
            if pause is None or not _may_pass(error, part):
                raise
            if isinstance(error, HTTPError) and error.code == RANGE_NOT_SATISFIABLE:
                part.unlink()  # longer than the file itself: nothing to continue
        time.sleep(pause)


def _may_pass(error: Exception, part: Path) -> bool:
    """Whether a new try can help. Where nothing ever came we are offline, which is better said at once."""
    if isinstance(error, HTTPError):
        return error.code in PASSING_CODES
    if isinstance(error, URLError):  # no connection, as opposed to one that was lost
        return part.exists()
    return isinstance(error, DROPPED)


def _fetch_rest(url: str, part: Path, size_bytes: int | None) -> None:
    """Add to `part` what it lacks, or all of it where the server cannot continue or has another version by now."""
    version_file = _version_file(part)
    version = version_file.read_text(encoding="utf-8") if version_file.exists() else ""
    length = part.stat().st_size if version and part.exists() else 0
    if length and length == size_bytes:
        return
    headers = {"User-Agent": "finestsam"}
    if length:
        headers |= {"Range": f"bytes={length}-", "If-Range": version}
    with build_opener(_Redirects).open(Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
        start, total = _locate_body(response)
        if size_bytes and total and total != size_bytes:
            raise UserError(f"{url}: the server offers {total:,} bytes, expected {size_bytes:,}")
        with open(part, "r+b" if start else "wb") as file:
            version_file.write_text(_read_version(response), encoding="utf-8")
            file.seek(start)
            _copy_body(response, file, total or size_bytes)


def _locate_body(response: HTTPResponse) -> tuple[int, int | None]:
    """Return where the body begins in the whole file and how long that is, bytes; None: the server does not say."""
    if response.status == 206:
        content_range = response.headers["Content-Range"] or ""  # "bytes 500-999/1000"
        numbers = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range)
        if numbers is None:
            raise HTTPException(
                f"the server sent Content-Range {content_range!r}, expected one like 'bytes 500-999/1000'"
            )
        return int(numbers[1]), int(numbers[2])
    length = response.headers["Content-Length"] or ""
    return 0, int(length) if length.isdigit() else None


def _read_version(response: HTTPResponse) -> str:
    """Return what If-Range recognises this version of the file by; empty: nothing does, it cannot be continued."""
    etag = response.headers["ETag"] or ""
    if etag and not etag.startswith("W/"):  # a weak tag does not promise the same bytes (RFC 9110, 13.1.5)
        return etag
    return response.headers["Last-Modified"] or ""


def _copy_body(response: HTTPResponse, file: BinaryIO, total: int | None) -> None:
    name = urlsplit(response.url).path.rpartition("/")[2]
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(desc=name, initial=file.tell(), total=total, unit="B", unit_scale=True, disable=None) as progress:
        # The length is watched here: neither read nor read1 says that a connection ended early.
        while total is None or file.tell() < total:
            block = response.read1(BLOCK_BYTES)
            if not block:
                break
            progress.update(file.write(block))
    file.flush()
    os.fsync(file.fileno())
    if total is not None and file.tell() < total:
        raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes, try again to continue")


def _check(url: str, part: Path, sha256: str | None, size_bytes: int | None) -> None:
    """Raise and remove `part` if it is not the file that was asked for."""
    problem = None
    size = part.stat().st_size
    if size_bytes is not None and size != size_bytes:
        problem = f"{size:,} bytes came, expected {size_bytes:,}"
    elif sha256 is not None and (actual := hash_file(part)) != sha256:
        problem = f"its sha256 is {actual}, expected {sha256}"
    if problem:
        part.unlink()
        raise UserError(f"{url}: {problem}; what came was removed, try again")


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


class _Redirects(HTTPRedirectHandler):
    """Follows a redirect only to where a download may begin, and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not _is_allowed(newurl) or (req.type == "https" and urlsplit(newurl).scheme == "http"):
            raise UserError(f"{req.full_url}: redirected to {newurl}, which is not https, refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_allowed(url: str) -> bool:
    address = urlsplit(url)
    if address.scheme == "https":
        return True
    try:
        return address.scheme == "http" and ipaddress.ip_address(address.hostname or "").is_loopback
    except ValueError:
        return address.hostname == "localhost"
