"""Unpack a zip file that is not trusted: all its entries are checked before the first byte is written."""

import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

from finestsam.errors import UserError, printable

MAX_RATIO = 100  # unpacked size / packed size: about 1 for jpg, below 10 for json, 1000 for a zip bomb
ANY_RATIO_BYTES = 1 << 20  # any ratio is allowed up to this size: a blank mask packs as well as a zip bomb
LIMIT_BYTES = 100_000_000_000
BLOCK_BYTES = 1 << 20

DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError)


def unpack(
    archive: Path,
    folder: Path,
    is_wanted: Callable[[str], bool] = lambda name: True,
    limit_bytes: int = LIMIT_BYTES,
) -> Path:
    """Unpack a zip file into `folder`, unless the folder exists, and return `folder`.

    The files are first written into `.{name}.unpacking` beside the folder, which is renamed when all files are
    complete. A rest of an interrupted call is removed first. Two processes must not unpack into the same folder at
    the same time.

    Args:
        is_wanted: whether to unpack the file with this name. Other files are neither checked nor written.
        limit_bytes: largest total size of the unpacked files.

    Raises:
        UserError: the archive is unsafe or damaged, or the disk is too full. No file is left behind.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.unpacking")
    try:
        with zipfile.ZipFile(archive) as source:
            members = [member for member in source.infolist() if is_wanted(member.filename)]
            if not members:
                raise UserError(f"{archive}: contains none of the expected files")
            _check_members(archive, members)
            _check_room(archive, members, partial.parent, limit_bytes)
            _remove(partial)
            try:
                _write_files(archive, source, members, partial)
                partial.rename(folder)
            finally:
                _remove(partial)
    except DAMAGED as error:
        problem = f"damaged, or not a zip file: {printable(error)}"
        raise UserError(f"{archive}: {problem}; remove it and fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot unpack {archive} into {folder}: {error.strerror or error}") from error
    return folder


def _check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raise a UserError if a member is unsafe, or if two members have the same path."""
    seen = set()
    for member in members:
        problem = _find_problem(member)
        path = PurePosixPath(member.filename)
        if problem is None and path in seen:
            problem = "is in it twice"
        if problem:
            raise UserError(f"{archive}: {printable(member.orig_filename)!r:.200} {problem}; not unpacked")
        seen.add(path)


def _find_problem(member: zipfile.ZipInfo) -> str | None:
    name = member.orig_filename  # not `filename`: zipfile cuts that at a NUL, and replaces \ by / on Windows
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or parts[0] == "/" or "\\" in name or "\0" in name or PureWindowsPath(name).drive:
        return "leads outside the folder, expected a relative path with / between its parts"
    kind = stat.S_IFMT(member.external_attr >> 16)  # the Unix mode; 0: the archive does not store it
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device, expected files and folders only"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is packed by method {member.compress_type}, expected 0 (stored) or 8 (deflated)"
    if member.file_size > max(ANY_RATIO_BYTES, MAX_RATIO * member.compress_size):
        return f"grows from {member.compress_size:,} to {member.file_size:,} bytes, expected at most {MAX_RATIO} times"
    return None


def _check_room(archive: Path, members: list[zipfile.ZipInfo], folder: Path, limit_bytes: int) -> None:
    """Raise a UserError if the members together exceed the limit or the free disk space."""
    size = archive.stat().st_size
    packed = sum(member.compress_size for member in members)
    if packed > size:  # several members use the same packed bytes
        raise UserError(f"{archive}: {packed:,} packed bytes in a file of {size:,}: its members overlap; not unpacked")
    total = sum(member.file_size for member in members)
    limit = min(limit_bytes, max(ANY_RATIO_BYTES, MAX_RATIO * size))
    if total > limit:
        raise UserError(f"{archive}: grows to {total:,} bytes, expected at most {limit:,}; not unpacked")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise UserError(f"{archive}: unpacks to {total:,} bytes, but {folder} has room for {free:,}; make room there")


def _write_files(archive: Path, source: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path) -> None:
    folder.mkdir()
    total = sum(member.file_size for member in members)
    # disable=None: no progress bar where stderr is not a terminal.
    with tqdm(desc=f"unpacking {archive.name}", total=total, unit="B", unit_scale=True, disable=None) as progress:
        for member in members:
            target = folder.joinpath(*PurePosixPath(member.filename).parts)
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_file(source, member, target)
            progress.update(member.file_size)


def _write_file(source: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Write one member. zipfile reads at most `file_size` bytes and checks the CRC at the end."""
    with source.open(member) as packed, open(target, "xb") as file:
        shutil.copyfileobj(packed, file, BLOCK_BYTES)
        length = file.tell()
    if length != member.file_size:
        raise zipfile.BadZipFile(f"{member.filename} ends after {length:,} of {member.file_size:,} bytes")


def _remove(folder: Path) -> None:
    if os.path.lexists(folder):
        shutil.rmtree(folder)
