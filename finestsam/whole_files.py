"""Files that are whole or not there, whatever happens while one is written: a kill, a full disk, a power cut."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, previous: Path | None = None, is_lasting: bool = True) -> Iterator[Path]:
    """Give a name beside `path` to write to; what is written takes the place of `path` when it is whole.

    Where writing fails the old file stays as it is, and nothing stays beside it.

    Args:
        previous: the name that the old file gets; None: it goes.
        is_lasting: wait for the disk, so that not even a power cut leaves half of it. Not worth it for what is made
            again.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        if is_lasting:
            _sync(partial)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
        if is_lasting:
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def replacing_set(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write files into that belong together; when all are whole, they take the places of an older set.

    Where writing fails the older set stays as it is, and nothing stays beside it.

    Args:
        names: what the set may consist of. Those that are not written go. The last one is taken away first and put in
            place last: where it is, the others are those that belong to it.
    """
    partial = folder / f".{names[-1]}.{os.getpid()}.tmp"
    partial.mkdir()
    try:
        yield partial
        written = {path.name for path in partial.iterdir()}
        for name in written:
            _sync(partial / name)
        (folder / names[-1]).unlink(missing_ok=True)
        for name in names:
            if name in written:
                os.replace(partial / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        _sync_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    for path in folder.glob(".*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
                continue
            with suppress(OSError):  # Windows: refuses while another process writes it
                path.unlink()


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


def _is_alive(pid: int) -> bool:
    """Whether another process has this number. In a container a new run often has the number of the one before it."""
    if pid == os.getpid() or os.name == "nt":  # Windows' os.kill would end the process
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
