"""Fetch files over https: continued where they were interrupted, checked as a whole, never half at their place.

Beside a target stand, meanwhile, `.{name}.part` (what came so far), `.{name}.part.version` (the server's mark of the
version that it belongs to) and `.{name}.lock`.
"""

import hashlib
import ipaddress
import os
import re
import ssl
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
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
BAR_BYTES = 10_000_000  # less is there before a progress bar can be read
MAX_BYTES = 1_000_000_000  # of a file whose size nobody knows, such as an image: a server may never end
PARALLEL_COUNT = 8  # small files: most of their time is waiting for the server

LENGTH = "[0-9]{1,18}"  # in a header

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
    _refuse_unsafe(url)
    with _explained(url, target, sha256):
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target.with_name(f".{target.name}.lock"), target):
            if not target.is_file():
                _bring(url, target, sha256, size_bytes)
    return target


def download_all(urls: dict[Path, str], title: str) -> None:
    """Fetch many small files, several at a time; files that exist are replaced.

    Nothing is locked: the caller sees to it that no other process fetches the same files meanwhile.

    Args:
        urls: by the place of the file. Their folders are there.
    """

    def bring(target: Path, was_reached: bool) -> None:
        _refuse_unsafe(urls[target])
        with _explained(urls[target], target, None):
            _bring(urls[target], target, None, None, was_reached)

    first, *others = urls
    with ThreadPoolExecutor(PARALLEL_COUNT) as pool, tqdm(desc=title, total=len(urls), disable=None) as progress:
        bring(first, False)  # alone: being offline is reported at once, and once
        progress.update()
        jobs = [pool.submit(bring, target, True) for target in others]
        try:
            for job in as_completed(jobs):
                job.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def lock(path: Path, subject: Path) -> AbstractContextManager:
    """Wait for and return the lock, which the system frees when its process ends, however it ends.

    Args:
        path: of the lock's own file.
        subject: what is downloaded meanwhile, for the screen.
    """
    file_lock = FileLock(path)
    try:
        return file_lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that downloads {subject}", file=sys.stderr)
        return file_lock.acquire()


@contextmanager
def _explained(url: str, target: Path, sha256: str | None) -> Iterator[None]:
    """Tell a fault of the network or the disk as the user's, with what can be done by hand."""
    try:
        yield
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error.reason if type(error) is URLError else error).split())
        by_hand = f"to fetch it by hand, save it as {target}" + (f" (sha256 {sha256})" if sha256 else "")
        raise UserError(f"cannot download {url}: {reason}; {by_hand}") from error


def _bring(url: str, target: Path, sha256: str | None, size_bytes: int | None, was_reached: bool = False) -> None:
    part = target.with_name(f".{target.name}.part")
    _fetch(url, part, size_bytes, was_reached)
    _check(url, part, sha256, size_bytes)
    os.replace(part, target)
    _version_file(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path, size_bytes: int | None, was_reached: bool) -> None:
    """Fetch with new tries. `was_reached`: another file came from there, so a refused connection may pass."""
    for pause in (*PAUSES_SECONDS, None):
        try:
            return _fetch_rest(url, part, size_bytes)
        except (OSError, HTTPException) as error:
            if pause is None or not _may_pass(error, was_reached or part.exists()):
                raise
            if isinstance(error, HTTPError) and error.code == RANGE_NOT_SATISFIABLE:
                part.unlink()  # longer than the file itself: nothing to continue
        time.sleep(pause)


def _may_pass(error: Exception, was_reached: bool) -> bool:
    """Whether a new try can help. Where nothing ever came we are offline, which is better said at once."""
    if isinstance(error, HTTPError):
        return error.code in PASSING_CODES
    if isinstance(error, URLError):  # no connection, as opposed to one that was lost
        return was_reached
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
        if response.status == 206 and (start != length or _read_version(response) not in (version, "")):
            version_file.unlink(missing_ok=True)  # the next try fetches the whole
            raise HTTPException(f"the server sent other bytes than those from {length:,} on of {version or 'the file'}")
        with open(part, "r+b" if start else "wb") as file:
            version_file.write_text(_read_version(response), encoding="utf-8")
            file.seek(start)
            _copy_body(response, file, total or size_bytes, size_bytes or MAX_BYTES)


def _locate_body(response: HTTPResponse) -> tuple[int, int | None]:
    """Return where the body begins in the whole file and how long that is, bytes; None: the server does not say."""
    if response.status == 206:
        content_range = response.headers["Content-Range"] or ""  # "bytes 500-999/1000"
        numbers = re.fullmatch(rf"bytes ({LENGTH})-{LENGTH}/({LENGTH})", content_range)
        if numbers is None:
            raise HTTPException(
                f"the server sent Content-Range {content_range!r}, expected one like 'bytes 500-999/1000'"
            )
        return int(numbers[1]), int(numbers[2])
    length = response.headers["Content-Length"] or ""
    return 0, int(length) if re.fullmatch(LENGTH, length) else None


def _read_version(response: HTTPResponse) -> str:
    """Return what If-Range recognises this version of the file by; empty: nothing does, it cannot be continued."""
    etag = response.headers["ETag"] or ""
    if etag and not etag.startswith("W/"):  # a weak tag does not promise the same bytes (RFC 9110, 13.1.5)
        return etag
    return response.headers["Last-Modified"] or ""


def _copy_body(response: HTTPResponse, file: BinaryIO, total: int | None, limit: int) -> None:
    """Write what comes.

    Args:
        total: bytes of the whole file; None: the server does not say.
        limit: bytes that it may have.
    """
    name = urlsplit(response.url).path.rpartition("/")[2]
    is_quick = total is not None and total < BAR_BYTES
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(
        desc=name, initial=file.tell(), total=total, unit="B", unit_scale=True, disable=is_quick or None
    ) as progress:
        # The length is watched here: neither read nor read1 says that a connection ended early.
        while total is None or file.tell() < total:
            if max(total or 0, file.tell()) > limit:
                raise UserError(f"{response.url}: more than {limit:,} bytes, which is no such file; not fetched")
            block = response.read1(BLOCK_BYTES)
            if not block:
                break
            progress.update(file.write(block))
    file.flush()
    os.fsync(file.fileno())
    if total is not None and file.tell() < total:
        raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes, try again to continue")


def _check(url: str, part: Path, sha256: str | None, size_bytes: int | None) -> None:
    """Raise and remove `part` if it is not the expected file."""
    problem = None
    size = part.stat().st_size
    if size_bytes is not None and size != size_bytes:
        problem = f"{size:,} bytes came, expected {size_bytes:,}"
    elif size == 0:
        problem = "an empty file came"
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


def _refuse_unsafe(url: str) -> None:
    if not _is_allowed(url):
        raise UserError(f"{url}: only https addresses are downloaded")


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
