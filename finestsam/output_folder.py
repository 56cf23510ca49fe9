"""Where results go: checked before any work is done for them."""

import os
from pathlib import Path

from finestsam.errors import UserError, printable
from finestsam.whole_files import remove_unfinished


def make_output_folder(folder: Path, dataset: str | None, setting: str = "out_dir") -> Path:
    """Make a folder to write into, if it is not there, and return it.

    Args:
        dataset: the dataset that is read, into which nothing is written.
        setting: its name on the command line.

    Raises:
        UserError: it is the root of the disk, the dataset, a file, or cannot be written into.
    """
    name = f"{setting} {printable(folder)}"
    if folder.resolve() == Path(folder.resolve().anchor):
        raise UserError(f"{name} is the root of the disk, expected a folder below it")
    if dataset and folder.resolve() == Path(dataset).resolve():
        raise UserError(f"{name} is the dataset, into which nothing is written; choose another --{setting}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{name} is a file, expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}: cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{name}: not writable")
    remove_unfinished(folder)
    return folder
