"""Output folders: checked before the work begins, used by one process at a time, with no file of the user's lost.

A file is replaced only if finestsam wrote it and nobody has changed it since. `.written.jsonl` in the folder holds one
line with the hash of each file that finestsam wrote.
"""

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from finestsam.errors import UserError, printable
from finestsam.runtime.whole_files import guard_folder, release_folder, remove_unfinished, write_text

WRITTEN_NAME = ".written.jsonl"
LOCK_NAME = ".written.lock"
SPARE_LINES = 1000  # outdated lines of `.written.jsonl` are dropped when there are more than this
BLOCK_BYTES = 1 << 20
# How many levels of a dataset are searched for links to folders of images.
DATASET_DEPTH = 3

_claims: dict[Path, "_Claim"] = {}


def claim_output_folder(folder: Path, dataset: str | None, names: Iterable[str] = ()) -> Path:
    """Make a folder for the results of a mode, lock it against other processes until it is released, and return it.

    From then on, only files that finestsam wrote can be replaced in it.

    Args:
        dataset: see `make_output_folder`.
        names: file names of the results.

    Raises:
        UserError: the folder is not writable, another process writes into it, or a file that finestsam did not write
            has one of the names.
    """
    make_output_folder(folder, dataset)
    resolved = folder.resolve()
    if resolved not in _claims:
        lock = lock_folder(folder / LOCK_NAME, f"another process writes into out_dir {printable(folder)}")
        _claims[resolved] = _Claim(resolved, lock)
        guard_folder(resolved, _claims[resolved].check_and_record)
    refuse_foreign(folder, names)
    return folder


def release_output_folders() -> None:
    """Let other processes write into the folders that this process has claimed."""
    for folder, claim in _claims.items():
        release_folder(folder)
        if claim.lock:
            claim.lock.release()
    _claims.clear()


def refuse_foreign(folder: Path, names: Iterable[str]) -> None:
    """Raise a UserError if a file in a claimed folder has one of the names and finestsam did not write it."""
    for name in names:
        if not is_replaceable(folder / name):
            raise UserError(_describe_foreign(folder / name))


def is_replaceable(path: Path) -> bool:
    """Return whether no file is there, or one that finestsam wrote into a claimed folder."""
    claim = _claims.get(path.parent.resolve())
    return not os.path.lexists(path) or (claim is not None and claim.has_written(path))


def lock_folder(lock_file: Path, owner: str) -> FileLock | None:
    """Lock a folder until the lock is released or this process ends for any reason; None: the disk has no locks.

    Args:
        owner: names the process that holds the lock, for the message.
    """
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{owner}; wait until it ends, or stop it") from None
    except (OSError, NotImplementedError) as error:
        folder = printable(lock_file.parent)
        print(f"warning: cannot lock {folder} ({error}): do not start a second process on it", file=sys.stderr)
        return None
    return lock


def make_output_folder(folder: Path, dataset: str | None, setting: str = "out_dir") -> Path:
    """Make a folder to write into, if it does not exist, and return it.

    Args:
        dataset: a folder or an annotation file that is read; finestsam never writes into a dataset.
        setting: the folder's name on the command line.

    Raises:
        UserError: the folder is the root of the disk, lies in the dataset, is a file, or is not writable.
    """
    name = f"{setting} {printable(folder)}"
    resolved = folder.resolve()
    if resolved == Path(resolved.anchor):
        raise UserError(f"{name} is the root of the disk, expected a folder below it")
    if dataset and _lies_in_dataset(resolved, _find_dataset(Path(dataset))):
        relation = "is" if resolved == _find_dataset(Path(dataset)) else "lies in"
        raise UserError(f"{name} {relation} the dataset, which is never written to; choose another --{setting}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{name} is a file, expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}: cannot be made: {error.strerror}") from None
    problem = try_to_write(folder)
    if problem:
        raise UserError(f"{name}: not writable: {problem}")
    remove_unfinished(folder)
    return folder


def try_to_write(folder: Path) -> str:
    """Return why a folder is not writable; empty: it is. Permissions alone do not show this, above all for root."""
    trial = folder / f".trial.{secrets.token_hex(8)}.finestsam.tmp"
    try:
        with trial.open("xb") as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or str(error)
    finally:
        with suppress(OSError):
            trial.unlink()
    return ""


def _find_dataset(dataset: Path) -> Path:
    """Return the folder without links. Of an annotation file, only its folder is resolved: the images lie there."""
    return dataset.parent.resolve() / dataset.name if dataset.is_file() else dataset.resolve()


def _lies_in_dataset(folder: Path, dataset: Path) -> bool:
    if dataset.is_file():  # annotations, with the images in images/ or beside them
        parent, images = dataset.parent, dataset.parent / "images"
        return folder == parent or folder.is_relative_to(images.resolve() if images.is_dir() else parent)
    if not dataset.is_dir():
        return False
    # With a link to a parent folder, every folder would count as part of the dataset.
    linked = [target for target in _list_links(dataset, DATASET_DEPTH) if not dataset.is_relative_to(target)]
    return any(folder.is_relative_to(target) for target in (dataset, *linked))


def _list_links(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the targets of links to folders."""
    try:
        entries = [entry for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return
    for entry in entries:
        if entry.is_symlink():
            yield Path(entry.path).resolve()
        elif depth > 1:
            yield from _list_links(Path(entry.path), depth - 1)


@dataclass
class _Claim:
    """A folder that this process writes into, and the files that finestsam wrote into it."""

    folder: Path
    lock: FileLock | None
    lines: dict[str, list[str]] = field(default_factory=dict)  # of `.written.jsonl`, by file name

    def __post_init__(self):
        path = self.folder / WRITTEN_NAME
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for line in text.splitlines():
            try:
                self.lines.setdefault(json.loads(line)["name"], []).append(line)
            except (ValueError, KeyError, TypeError):
                continue  # incomplete: the process was killed
        if sum(map(len, self.lines.values())) > 2 * len(self.lines) + SPARE_LINES:
            # Two lines a file: if a process is killed, the last is of the unfinished file, the one before of the old.
            self.lines = {name: lines[-2:] for name, lines in self.lines.items()}
            write_text(path, "".join(f"{line}\n" for lines in self.lines.values() for line in lines))

    def has_written(self, path: Path) -> bool:
        """Return whether finestsam wrote the file and it has not changed since."""
        if path.is_symlink() or not path.is_file() or path.name not in self.lines:
            return False
        return _describe(path.name, path) in self.lines[path.name]

    def check_and_record(self, path: Path, content: Path | None) -> None:
        """Raise a UserError if finestsam did not write the old file at `path`; record the hash of the new one.

        Args:
            content: the new file; None: the old file is removed.
        """
        if path.name.startswith("."):  # a file of finestsam's own, not for the user
            return
        if os.path.lexists(path) and not self.has_written(path):
            raise UserError(_describe_foreign(path))
        if content is None:
            return
        line = _describe(path.name, content)
        with (self.folder / WRITTEN_NAME).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.lines.setdefault(path.name, []).append(line)


def _describe(name: str, content: Path) -> str:
    digest = hashlib.sha256()
    with content.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return json.dumps({"name": name, "sha256": digest.hexdigest()}, allow_nan=False)


def _describe_foreign(path: Path) -> str:
    return (
        f"{printable(path)} is not replaced: finestsam did not write it, or it was changed since; move it away, or "
        "choose another --out_dir"
    )


def cache_folder() -> Path:
    """Return $FINESTSAM_CACHE, or finestsam/ in the user's cache folder. It may not exist yet.

    Raises:
        UserError: there is no home folder, as in a container that runs under an unknown user id.
    """
    try:
        if own := os.environ.get("FINESTSAM_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finestsam"
    except RuntimeError:
        raise UserError("no home folder for downloads and caches: set FINESTSAM_CACHE to a folder") from None
