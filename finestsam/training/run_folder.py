"""Make the folder of a run."""

import itertools
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from finestsam.errors import UserError
from finestsam.output_folder import make_output_folder


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
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} is not writable; choose another --sav_dir")
    return folder


def lock_run(folder: Path) -> FileLock | None:
    """Keep other processes out of a run, until the lock is released or this process ends, however it ends.

    Raises:
        UserError: another process has it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another process trains this run; wait for its end, or stop it") from None
    except (OSError, NotImplementedError) as error:
        print(f"warning: {folder} cannot be locked ({error}): start no second process on this run", file=sys.stderr)
        return None
    return lock


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
