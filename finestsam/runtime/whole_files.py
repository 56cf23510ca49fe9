"""Files that are whole or not there, whatever happens while one is written: a kill, a full disk, a power cut.

What is being written has a name that nothing else has, `.NAME.0123456789abcdef.finestsam.tmp`, and is locked by its
process: so the rest of a killed process is never taken for the file of a running one, in whatever container or on
whatever machine.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove a file that is open
    fcntl = None

UNFINISHED = re.compile(r"\..*\.[0-9a-f]{16}\.finestsam\.tmp")
OWNER = ".owner"  # in an unfinished folder: the file that is locked
MAX_NAME = 40  # letters of the name that are kept in the unfinished one, which may be no longer than 255 bytes

_guards: dict[Path, Callable[[Path, Path | None], None]] = {}


def guard_folder(folder: Path, guard: Callable[[Path, Path | None], None]) -> None:
    """Call a function before a file of a folder is replaced.

    Args:
        folder: resolved.
        guard: called with the path and with the file that will take its place, None: the path goes. What it raises
            leaves everything as it is.
    """
    _guards[folder] = guard


def release_folder(folder: Path) -> None:
    _guards.pop(folder, None)


def _call_guard(path: Path, content: Path | None) -> None:
    guard = _guards.get(path.parent.resolve()) if _guards else None
    if guard:
        guard(path, content)


@contextmanager
def replacing(path: Path, previous: Path | None = None, is_lasting: bool = True) -> Iterator[Path]:
    """Give a name beside `path` to write to; what is written takes the place of `path` when it is whole.

    Where writing fails the old file stays as it is, and nothing stays beside it.

    Args:
        previous: the name that the old file gets; None: it goes.
        is_lasting: wait for the disk, so that not even a power cut leaves half of it. Not worth it for what is made
            again.
    """
    partial = _name_unfinished(path)
    descriptor = _lock(partial)
    try:
        yield partial
        if is_lasting:
            _sync(partial)
        _call_guard(path, partial)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
        if is_lasting:
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()
        _unlock(descriptor)


@contextmanager
def replacing_set(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write files into that belong together; when all are whole, they replace an older set.

    Where writing fails the older set stays as it is, and nothing stays beside it.

    Args:
        names: what the set may consist of. Those that are not written go. The last one is taken away first and put in
            place last: where it is, the others are those that belong to it.
    """
    with unfinished_folder(folder / names[-1]) as partial:
        yield partial
        written = {path.name for path in partial.iterdir()} - {OWNER}
        for name in written:
            _sync(partial / name)
        for name in names:
            _call_guard(folder / name, partial / name if name in written else None)
        (folder / names[-1]).unlink(missing_ok=True)
        for name in names:
            if name in written:
                os.replace(partial / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        _sync_folder(folder)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """Make and give a folder beside `path` to write into, and remove it with what is still in it."""
    partial = _name_unfinished(path)
    partial.mkdir()
    descriptor = None
    try:
        descriptor = _lock(partial / OWNER)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unlock(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, or leave the old one."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a whole file in UTF-8, or leave the old one."""
    # File names that are no UTF-8 come back as they were.
    write_bytes(path, text.encode("utf-8", errors="surrogateescape"))


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    """Write a whole json file, or leave the old one.

    Raises:
        ValueError: a number is not finite, which json cannot say.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left."""
    for path in folder.glob(".*.finestsam.tmp"):
        if not UNFINISHED.fullmatch(path.name) or not _is_abandoned(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with suppress(OSError):  # Windows: refuses while another process writes it
            path.unlink()


def _name_unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name[:MAX_NAME]}.{secrets.token_hex(8)}.finestsam.tmp")


def _lock(path: Path) -> int | None:
    """Make an empty file that is locked until `_unlock` or the end of this process, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    if fcntl is None:  # where an open file cannot be renamed either
        os.close(descriptor)
        return None
    with suppress(OSError):  # a disk without locks: what is left there stays
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    """Whether no process works on an unfinished file or folder any more. Where that is not known the file stays."""
    lock_file = path / OWNER if path.is_dir() else path
    if path.is_symlink() or lock_file.is_symlink() or not lock_file.is_file():
        return False
    if fcntl is None:
        return True
    try:
        descriptor = os.open(lock_file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Bring what is written to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk; the content is there already."""
    with suppress(OSError):  # Windows and some network drives cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
