"""Where results go: checked before any work is done for them, one process at a time, and nothing in it is lost.

A file is replaced only where finestsam wrote it and nobody has changed it since. What was written is known by its hash,
a line for each file in `.written.jsonl` beside it.
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
SPARE_LINES = 1000  # more of older files are forgotten
BLOCK_BYTES = 1 << 20
# How deep below a dataset its folders of images are looked for, which may be links.
DATASET_DEPTH = 3

_claims: dict[Path, "_Claim"] = {}


def claim_output_folder(folder: Path, dataset: str | None, names: Iterable[str] = ()) -> Path:
    """Make a folder for the results of a mode, keep other processes out of it until they are released, and return it.

    From then on a file that finestsam did not write there cannot be replaced.

    Args:
        dataset: as `make_output_folder` has it.
        names: of the results.

    Raises:
        UserError: nothing can be written there, another process writes there, or a file of somebody else has one of
            the names.
    """
    make_output_folder(folder, dataset)
    place = folder.resolve()
    if place not in _claims:
        lock = lock_folder(folder / LOCK_NAME, f"another process writes into out_dir {printable(folder)}")
        _claims[place] = _Claim(place, lock)
        guard_folder(place, _claims[place].admit)
    refuse_foreign(folder, names)
    return folder


def release_output_folders() -> None:
    """Let other processes write into what this one has claimed."""
    for place, claim in _claims.items():
        release_folder(place)
        if claim.lock:
            claim.lock.release()
    _claims.clear()


def refuse_foreign(folder: Path, names: Iterable[str]) -> None:
    """Raise a UserError where a file of a claimed folder has one of the names and is not finestsam's."""
    for name in names:
        if not is_replaceable(folder / name):
            raise UserError(_describe_foreign(folder / name))


def is_replaceable(path: Path) -> bool:
    """Whether nothing is there, or what finestsam wrote into a folder that is claimed."""
    claim = _claims.get(path.parent.resolve())
    return not os.path.lexists(path) or (claim is not None and claim.wrote(path))


def lock_folder(lock_file: Path, owner: str) -> FileLock | None:
    """Lock a folder until the lock is released or this process ends, however it ends; None where the disk has no locks.

    Args:
        owner: what the message says of another process that has it.
    """
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{owner}; wait for its end, or stop it") from None
    except (OSError, NotImplementedError) as error:
        place = printable(lock_file.parent)
        print(f"warning: {place} cannot be locked ({error}): start no second process on it", file=sys.stderr)
        return None
    return lock


def make_output_folder(folder: Path, dataset: str | None, setting: str = "out_dir") -> Path:
    """Make a folder to write into, if it is not there, and return it.

    Args:
        dataset: the dataset that is read, a folder or an annotation file, into which nothing is written.
        setting: its name on the command line.

    Raises:
        UserError: it is the root of the disk, lies in the dataset, is a file, or cannot be written into.
    """
    name = f"{setting} {printable(folder)}"
    place = folder.resolve()
    if place == Path(place.anchor):
        raise UserError(f"{name} is the root of the disk, expected a folder below it")
    if dataset and _lies_in_dataset(place, _find_dataset(Path(dataset))):
        is_it = "is" if place == _find_dataset(Path(dataset)) else "lies in"
        raise UserError(f"{name} {is_it} the dataset, into which nothing is written; choose another --{setting}")
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
    """Return why no file can be made in a folder; empty: one can. Rights alone do not tell, for root least of all."""
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
    """Return the folder behind links; of an annotation file the place where it is named, as its images lie there."""
    return dataset.parent.resolve() / dataset.name if dataset.is_file() else dataset.resolve()


def _lies_in_dataset(place: Path, dataset: Path) -> bool:
    if dataset.is_file():  # annotations, with the images in images/ or beside them
        folder, images = dataset.parent, dataset.parent / "images"
        return place == folder or place.is_relative_to(images.resolve() if images.is_dir() else folder)
    if not dataset.is_dir():
        return False
    # A link that leads upwards would make everything part of the dataset.
    linked = [folder for folder in _list_links(dataset, DATASET_DEPTH) if not dataset.is_relative_to(folder)]
    return any(place.is_relative_to(folder) for folder in (dataset, *linked))


def _list_links(folder: Path, depth: int) -> Iterator[Path]:
    """Yield where links to folders lead."""
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
    """A folder that this process writes into, and the files that finestsam wrote there."""

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
                continue  # cut short by a kill
        if sum(map(len, self.lines.values())) > 2 * len(self.lines) + SPARE_LINES:
            # The last two: of what was to be written when a process was killed, and of what stayed.
            self.lines = {name: lines[-2:] for name, lines in self.lines.items()}
            write_text(path, "".join(f"{line}\n" for lines in self.lines.values() for line in lines))

    def wrote(self, path: Path) -> bool:
        if path.is_symlink() or not path.is_file() or path.name not in self.lines:
            return False
        return _describe(path.name, path) in self.lines[path.name]

    def admit(self, path: Path, content: Path | None) -> None:
        """Note what takes the place of a file, or raise where that is not finestsam's.

        Args:
            content: the file that is put there; None: nothing is.
        """
        if path.name.startswith("."):  # what is not for the user
            return
        if os.path.lexists(path) and not self.wrote(path):
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
        f"{printable(path)} is not replaced: it is no result of finestsam's, or was changed since; move it away, or "
        "choose another --out_dir"
    )


def cache_folder() -> Path:
    """Return $FINESTSAM_CACHE, or finestsam/ in the user's cache folder. It may not exist yet.

    Raises:
        UserError: there is no home, as in containers that run under a number that belongs to nobody.
    """
    try:
        if own := os.environ.get("FINESTSAM_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finestsam"
    except RuntimeError:
        raise UserError(
            "no home folder is known to keep downloads and caches in: set FINESTSAM_CACHE to a folder"
        ) from None
