"""The folder of a run: how it is made and locked, and what is written into it."""

import dataclasses
import itertools
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from finestsam.config import Config
from finestsam.data.fingerprint import SPLIT
from finestsam.data.read import LabelledSet, describe_dataset
from finestsam.errors import UserError
from finestsam.records import write_report
from finestsam.runtime.folders import lock_folder, make_output_folder, try_to_write
from finestsam.runtime.whole_files import write_json, write_text
from finestsam.tasks.base import Task
from finestsam.training import checkpoint
from finestsam.training.log import RunLog
from finestsam.training.plots import plot_curves
from finestsam.training.time_budget import TimeBudget

SUBFOLDERS = ("adapter", "plots", "previous_logits")


@dataclass
class RunFolder:
    """What a run keeps on disk. Only the first rank writes.

    Attributes:
        lock: which the first rank holds while the run lasts.
        log: metrics.csv and what follows from it; None on the other ranks, and before the first epoch.
    """

    path: Path
    lock: FileLock | None
    top: checkpoint.TopWeights
    is_first_rank: bool
    log: RunLog | None = None
    saving: TimeBudget = field(default_factory=TimeBudget)  # of last.ckpt
    plotting: TimeBudget = field(default_factory=TimeBudget)  # of the curves

    @property
    def best(self) -> Path:
        return self.path / "best.pth"

    def describe(self, config: Config, data: LabelledSet, fingerprint: dict[str, Any]) -> None:
        """Write the settings of a run that begins, then the report and the split.

        A run that is killed meanwhile can be continued from the first on.
        """
        if not self.is_first_rank:
            return
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}
        write_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        write_report(self.path / "dataset_report.json", describe_dataset(data.report, data.train + data.val))
        write_json(self.path / SPLIT, fingerprint, indent=1)

    def open_log(self, task: Task, num_epochs: int, resumed_epoch: int | None) -> None:
        """Begin metrics.csv, or go on with it.

        Args:
            resumed_epoch: as of `RunLog`.
        """
        if self.is_first_rank:
            self.log = RunLog(self.path, task, resumed_epoch, num_epochs)

    def plot_curves(self) -> None:
        if self.log is None:
            return
        try:
            plot_curves(self.log.read_rows(), self.log.task.measures, self.path)
        except OSError as error:
            print(f"curves not plotted: {error}", file=sys.stderr)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self.log:
            self.log.close()
        if self.lock:
            self.lock.release()


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
    for path in (folder, *(folder / name for name in SUBFOLDERS)):
        problem = try_to_write(path) if path == folder or os.path.lexists(path) else ""
        if problem:
            raise UserError(f"--resume: {path} cannot be written: {problem}; what it learns could not be kept")
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
