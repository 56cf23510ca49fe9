"""Make the folder of a run."""

import itertools
import os
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from finestsam.errors import UserError
from finestsam.runtime.folders import lock_folder, make_output_folder, try_to_write

SUBFOLDERS = ("adapter", "plots", "previous_logits")


def create_run_folder(sav_dir: Path, name: str | None, dataset: str | None = None) -> Path:
    """Make a new folder below sav_dir and return it.

    Args:
        name: None: the local time. Runs that start in the same second get folders of their own.
        dataset: what is trained on, into which nothing is written.

    Raises:
        UserError: nothing can be written there, or the name belongs to another run.
    """
    make_output_folder(sav_dir, dataset, "sav_dir")
    try:
        folder = _create_dated_folder(sav_dir) if name is None else _create_named_folder(sav_dir, name)
    except OSError as error:
        raise UserError(f"sav_dir {sav_dir}: cannot make the run's folder in it: {error.strerror}") from None
    if problem := try_to_write(folder):
        raise UserError(f"{folder} is not writable: {problem}; choose another --sav_dir")
    return folder


def take_up_run(folder: Path) -> FileLock | None:
    """Lock a run that is to be continued, as `lock_run` does.

    Raises:
        UserError: what it would learn could not be kept, or another process has it.
    """
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        problem = try_to_write(place) if place == folder or os.path.lexists(place) else ""
        if problem:
            raise UserError(f"--resume: {place} cannot be written: {problem}; what it learns could not be kept")
    return lock_run(folder)


def lock_run(folder: Path) -> FileLock | None:
    """Keep other processes out of a run, until the lock is released or this process ends, however it ends.

    Raises:
        UserError: another process has it.
    """
    return lock_folder(folder / ".lock", f"{folder}: another process trains this run")


def _create_dated_folder(sav_dir: Path) -> Path:
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = sav_dir / (now if number == 1 else f"{now}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def _create_named_folder(sav_dir: Path, name: str) -> Path:
    if name in ("", "..") or Path(name).name != name or not name.isprintable():
        raise UserError(f"run_name {name!r} is not the plain name of a folder; --sav_dir says where it lies")
    folder = sav_dir / name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --run_name")
    folder.mkdir(exist_ok=True)
    # Hidden ones are the lock and the half files of a process that was killed before it began.
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} holds files; choose another --run_name, or continue that run with --resume {folder}")
    return folder
