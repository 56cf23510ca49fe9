"""Download files over https. An interrupted download continues; a file is checked before it gets its final name.

During a download, three more files lie beside the target: `.{name}.part` (the bytes received so far),
`.{name}.part.version` (the server's ETag or date of these bytes) and `.{name}.lock`.
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

PAUSES_SECONDS = (1, 2, 4)  # before each retry
TIMEOUT_SECONDS = 30  # without receiving a byte
BLOCK_BYTES = 1 << 20
PROGRESS_BAR_BYTES = 10_000_000  # smaller files arrive before a progress bar can be read
MAX_BYTES = 1_000_000_000  # of a file of unknown size, such as an image: a server may send forever
PARALLEL_COUNT = 8  # for small files, most of the time is waiting for the server

LENGTH = "[0-9]{1,18}"  # in a header

CONNECTION_LOST = (ConnectionError, TimeoutError, ssl.SSLError, HTTPException)
RANGE_NOT_SATISFIABLE = 416
RETRIED_CODES = {408, RANGE_NOT_SATISFIABLE, 429, 500, 502, 503, 504}


def download(url: str, target: Path, sha256: str | None, size_bytes: int | None) -> Path:
    """Download `url` to `target`, unless `target` exists, and return `target`.

    If several processes want the same target, one downloads it and the others wait.

    Args:
        url: https; http only for loopback addresses.
        sha256: expected hash of the file; None: not checked.
        size_bytes: expected size; None: not checked.
    """
    if target.is_file():
        return target
    _refuse_unsafe(url)
    with _reporting_failure(url, target, sha256):
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target.with_name(f".{target.name}.lock"), target):
            if not target.is_file():
                _fetch_file(url, target, sha256, size_bytes)
    return target


def download_all(urls: dict[Path, str], title: str) -> None:
    """Download many small files in parallel and replace existing ones.

    There is no lock: the caller makes sure that no other process downloads the same files.

    Args:
        urls: by target path. The folders of the targets exist.
    """

    def fetch(target: Path, was_reached: bool) -> None:
        _refuse_unsafe(urls[target])
        with _reporting_failure(urls[target], target, None):
            _fetch_file(urls[target], target, None, None, was_reached)

    first, *others = urls
    with ThreadPoolExecutor(PARALLEL_COUNT) as pool, tqdm(desc=title, total=len(urls), disable=None) as progress:
        fetch(first, False)  # before the others: a missing connection is reported at once, and only once
        progress.update()
        jobs = [pool.submit(fetch, target, True) for target in others]
        try:
            for job in as_completed(jobs):
                job.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def lock(path: Path, subject: Path) -> AbstractContextManager:
    """Wait for the lock and return it. The system releases it when the process ends for any reason.

    Args:
        path: the lock file.
        subject: the file to download, for the message.
    """
    file_lock = FileLock(path)
    try:
        return file_lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that downloads {subject}", file=sys.stderr)
        return file_lock.acquire()


@contextmanager
def _reporting_failure(url: str, target: Path, sha256: str | None) -> Iterator[None]:
    """Turn an error of the network or the disk into a UserError that says how to download the file by hand."""
    try:
        yield
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error.reason if type(error) is URLError else error).split())
        by_hand = f"to fetch it by hand, save it as {target}" + (f" (sha256 {sha256})" if sha256 else "")
        raise UserError(f"cannot download {url}: {reason}; {by_hand}") from error


def _fetch_file(url: str, target: Path, sha256: str | None, size_bytes: int | None, was_reached: bool = False) -> None:
    part = target.with_name(f".{target.name}.part")
    _fetch_with_retries(url, part, size_bytes, was_reached)
    _check(url, part, sha256, size_bytes)
    os.replace(part, target)
    _name_version_file(part).unlink(missing_ok=True)


def _fetch_with_retries(url: str, part: Path, size_bytes: int | None, was_reached: bool) -> None:
    """Download to `part`, and retry after errors.

    Args:
        was_reached: whether another file arrived from this server, so that a refused connection is worth a retry.
    """
    for pause in (*PAUSES_SECONDS, None):
        try:
            return _fetch_rest(url, part, size_bytes)
        except (OSError, HTTPException) as error:
            if pause is None or not _is_worth_a_retry(error, was_reached or part.exists()):
                raise
            if isinstance(error, HTTPError) and error.code == RANGE_NOT_SATISFIABLE:
                part.unlink()  # longer than the file on the server, so the download cannot continue
        time.sleep(pause)


def _is_worth_a_retry(error: Exception, was_reached: bool) -> bool:
    """Return whether a retry can help. Not if no byte ever arrived: then the machine is offline."""
    if isinstance(error, HTTPError):
        return error.code in RETRIED_CODES
    if isinstance(error, URLError):  # there never was a connection; a lost one is another error
        return was_reached
    return isinstance(error, CONNECTION_LOST)


def _fetch_rest(url: str, part: Path, size_bytes: int | None) -> None:
    """Append the missing bytes to `part`. Download all of it if the server cannot continue or has another version."""
    version_file = _name_version_file(part)
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
            version_file.unlink(missing_ok=True)  # so the next attempt downloads the whole file
            wanted = f"byte {length:,} on" + (f" of version {version}" if version else "")
            raise HTTPException(f"the server sent other bytes than requested (from {wanted})")
        with open(part, "r+b" if start else "wb") as file:
            version_file.write_text(_read_version(response), encoding="utf-8")
            file.seek(start)
            _copy_body(response, file, total or size_bytes, size_bytes or MAX_BYTES)


def _locate_body(response: HTTPResponse) -> tuple[int, int | None]:
    """Return the position of the body in the file and the file's size, bytes; None: the server does not say."""
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
    """Return the value for If-Range that names this version of the file; empty: the download cannot continue later."""
    etag = response.headers["ETag"] or ""
    if etag and not etag.startswith("W/"):  # a weak tag does not guarantee the same bytes (RFC 9110, 13.1.5)
        return etag
    return response.headers["Last-Modified"] or ""


def _copy_body(response: HTTPResponse, file: BinaryIO, total: int | None, limit: int) -> None:
    """Write the received bytes to the file.

    Args:
        total: size of the whole file in bytes; None: the server does not say.
        limit: largest allowed size in bytes.
    """
    name = urlsplit(response.url).path.rpartition("/")[2]
    is_quick = total is not None and total < PROGRESS_BAR_BYTES
    # disable=None: no progress bar where stderr is not a terminal.
    with tqdm(
        desc=name, initial=file.tell(), total=total, unit="B", unit_scale=True, disable=is_quick or None
    ) as progress:
        # The length is checked here, since neither read nor read1 reports that a connection ended early.
        while total is None or file.tell() < total:
            if max(total or 0, file.tell()) > limit:
                raise UserError(f"{response.url}: more than {limit:,} bytes, too large for this file; not downloaded")
            block = response.read1(BLOCK_BYTES)
            if not block:
                break
            progress.update(file.write(block))
    file.flush()
    os.fsync(file.fileno())
    if total is not None and file.tell() < total:
        raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes, try again to continue")


def _check(url: str, part: Path, sha256: str | None, size_bytes: int | None) -> None:
    """Remove `part` and raise a UserError if it is not the expected file."""
    problem = None
    size = part.stat().st_size
    if size_bytes is not None and size != size_bytes:
        problem = f"received {size:,} bytes, expected {size_bytes:,}"
    elif size == 0:
        problem = "received an empty file"
    elif sha256 is not None and (actual := hash_file(part)) != sha256:
        problem = f"its sha256 is {actual}, expected {sha256}"
    if problem:
        part.unlink()
        raise UserError(f"{url}: {problem}; the download was removed, try again")


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _name_version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _refuse_unsafe(url: str) -> None:
    if not _is_allowed(url):
        raise UserError(f"{url}: only https addresses are downloaded")


class _Redirects(HTTPRedirectHandler):
    """Follows a redirect only to an allowed address, and never from https to http."""

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
