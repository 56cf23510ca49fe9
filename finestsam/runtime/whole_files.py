"""Write files that are either complete or absent, even after a kill, a full disk or a power cut.

A file is first written under a unique name, `.NAME.0123456789abcdef.finestsam.tmp`, which its process locks. An
unlocked one is therefore the rest of a killed process, even if processes run in several containers or machines.
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
except ImportError:  # Windows needs no lock: it does not remove an open file
    fcntl = None

UNFINISHED = re.compile(r"\..*\.[0-9a-f]{16}\.finestsam\.tmp")
OWNER = ".owner"  # the locked file of an unfinished folder
MAX_NAME = 40  # letters of the final name in the temporary one, since a name has at most 255 bytes

_guards: dict[Path, Callable[[Path, Path | None], None]] = {}


def guard_folder(folder: Path, guard: Callable[[Path, Path | None], None]) -> None:
    """Call a function before a file of a folder is replaced.

    Args:
        folder: resolved.
        guard: called with the path and with the new file (None: the path is removed). If it raises, no file changes.
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
    """Give a temporary path beside `path` to write to, which replaces `path` when it is complete.

    If writing fails, the old file stays as it is and the temporary file is removed.

    Args:
        previous: new name of the old file; None: the old file is removed.
        is_lasting: whether to wait for the disk, so that a power cut cannot leave half a file. Not needed for files
            that can be made again.
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
    """Give a folder for files that belong together. When all are complete, they replace the older set in `folder`.

    If writing fails, the older set stays as it is and the temporary folder is removed.

    Args:
        names: all file names that the set can have. Old files that are not written again are removed. The last name is
            removed first and written last: while it exists, the others belong to the same set.
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
    """Make and give a temporary folder beside `path`; remove it and its remaining files afterwards."""
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
    """Write a file completely, or keep the old one."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 completely, or keep the old one."""
    # surrogateescape keeps the bytes of file names that are not UTF-8.
    write_bytes(path, text.encode("utf-8", errors="surrogateescape"))


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    """Write a json file completely, or keep the old one.

    Raises:
        ValueError: a number is not finite; json has no form for it.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while writing."""
    for path in folder.glob(".*.finestsam.tmp"):
        if not UNFINISHED.fullmatch(path.name) or not _is_abandoned(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with suppress(OSError):  # Windows refuses while another process writes it
            path.unlink()


def _name_unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name[:MAX_NAME]}.{secrets.token_hex(8)}.finestsam.tmp")


def _lock(path: Path) -> int | None:
    """Make an empty file that is locked until `_unlock` or the end of this process for any reason."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    if fcntl is None:  # Windows cannot rename an open file
        os.close(descriptor)
        return None
    with suppress(OSError):  # on a disk without locks, temporary files of killed processes stay
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    """Return whether no process writes an unfinished file or folder any more; False where this is not known."""
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
    """Wait until the content of a file is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Wait until a new file name is on the disk; the content is there already."""
    with suppress(OSError):  # Windows and some network drives do not support it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
