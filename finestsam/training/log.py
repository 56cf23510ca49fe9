"""The log of a run: a row of metrics.csv and a printed line for each epoch, and TensorBoard where it is installed."""

import csv
import io
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.fabric.loggers import TensorBoardLogger
from tqdm import tqdm

from finestsam.errors import UserError
from finestsam.runtime.value_types import read_number
from finestsam.runtime.whole_files import write_text
from finestsam.tasks.base import Task

# Of every run, before what its task measures.
RUN_COLUMNS = ("epoch", "step", "seconds", "validation_seconds", "learning_rate")

Row = dict[str, float | None]


def list_columns(task: Task) -> tuple[str, ...]:
    """Return the columns of metrics.csv."""
    return (*RUN_COLUMNS, *task.measures, *task.columns)


class RunLog:
    """`metrics.csv` and `tensorboard/` in the folder of a run; only the first rank has one.

    A full disk never ends a run: it is reported once, and the rows stay in memory until the next epoch.

    Args:
        resumed_epoch: complete epochs of the checkpoint that the run continues from, whose rows stay; None: a new run.
        num_epochs: for the line on the screen.

    Raises:
        UserError: the metrics.csv of a continued run is damaged.
    """

    def __init__(self, folder: Path, task: Task, resumed_epoch: int | None = None, num_epochs: int | None = None):
        self.folder = folder
        self.task = task
        self.columns = list_columns(task)
        self.num_epochs = num_epochs
        self._is_resumed = resumed_epoch is not None
        self._rows: list[Row] = []
        self._tensorboard: TensorBoardLogger | None = None
        self._warned: set[str] = set()
        if resumed_epoch is not None:
            self._rows = [row for row in read_metrics(self.path, self.columns) if row["epoch"] <= resumed_epoch]
            self._write_rows()

    @property
    def path(self) -> Path:
        return self.folder / "metrics.csv"

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Write the losses of an optimizer step to TensorBoard."""
        self._send({f"train/{name}": value for name, value in values.items()}, step)

    def log_epoch(self, row: Mapping[str, float | None], baseline: Mapping[str, float] | None = None) -> None:
        """Write the row of an epoch, drop older rows of it and of later epochs, and print it.

        Args:
            row: by column; what is missing, None or not finite is an empty field. Epoch 0 is the baseline.
            baseline: the validation of the baseline.
        """
        unknown = row.keys() - set(self.columns)
        assert not unknown, f"metrics.csv has no columns {sorted(unknown)}"
        whole = {name: _finite_or_none(row.get(name)) for name in self.columns}
        self._rows = [earlier for earlier in self._rows if earlier["epoch"] < whole["epoch"]] + [whole]
        self._write_rows()
        measured = {f"validation/{name}": whole[name] for name in self.columns if name.startswith("val_")}
        self._send(measured, whole["step"], flush=True)
        print(describe_epoch(whole, self.task.printed, self.num_epochs, baseline), flush=True)

    def read_rows(self) -> list[Row]:
        """Return the rows so far, the first epoch first."""
        return [dict(row) for row in self._rows]

    def close(self) -> None:
        """Write what TensorBoard has buffered of an unfinished epoch."""
        if self._tensorboard is not None:
            self._tensorboard.finalize("success")
            self._tensorboard = None

    def _write_rows(self) -> None:
        """Replace the whole file, so that a killed run leaves no half row and a resumed one no double row."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _format_number(value) for name, value in row.items()} for row in self._rows)
        try:
            write_text(self.path, text.getvalue())
        except OSError as error:
            self._warn_once(self.path.name, error)

    def _send(self, values: Mapping[str, float | None], step: int, flush: bool = False) -> None:
        known = {name: value for name, value in values.items() if _finite_or_none(value) is not None}
        if not known or "tensorboard" in self._warned:
            return
        try:
            if self._tensorboard is None:
                self._tensorboard = self._open_tensorboard(step)
            self._tensorboard.log_metrics(known, step)
            if flush:
                self._tensorboard.save()
        except ImportError:  # TensorBoard is optional
            self._warned.add("tensorboard")
        except (OSError, ValueError) as error:  # Fabric's logger raises ValueError for any problem
            self._warn_once("tensorboard", error.__cause__ or error)

    def _open_tensorboard(self, step: int) -> TensorBoardLogger:
        # Hide what an interrupted run logged from this step on, because these steps are logged again.
        purge_step = step if self._is_resumed else None
        return TensorBoardLogger(self.folder, name="", version="tensorboard", purge_step=purge_step)

    def _warn_once(self, what: str, error: BaseException) -> None:
        if what not in self._warned:
            self._warned.add(what)
            reason = getattr(error, "strerror", None) or error
            print(f"warning: {self.folder / what} not written: {reason}", file=sys.stderr)


def read_metrics(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """Return the rows of a metrics.csv; none where there is no such file."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_parse_line(line, columns) for line in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not as finestsam wrote it ({error}); move it away to continue without it") from None


def _parse_line(line: dict[str, str | None], columns: tuple[str, ...]) -> Row:
    missing = {"epoch", "step"} - line.keys()
    if missing:
        raise ValueError(f"no columns {sorted(missing)}")
    row = {name: read_number(line[name]) if line.get(name) else None for name in columns}
    return row | {"epoch": int(line["epoch"] or ""), "step": int(line["step"] or "")}


# What the screen shows of an epoch's training.
TRAINING_FORMS = {
    "total_loss": "loss {:.3f}",
    "iou": "iou {:.2f}",
    "pixel_accuracy": "accuracy {:.2f}",
    "class_accuracy": "class {:.2f}",
    "learning_rate": "lr {:.1e}",
    "seconds": "{:.1f} s",
}


def describe_epoch(
    row: Row, printed: Mapping[str, str], num_epochs: int | None = None, baseline: Mapping[str, float] | None = None
) -> str:
    """Return the lines for the screen, without what the row lacks.

        epoch 3/30 step 108 loss 0.412 iou 0.61 lr 4.0e-05 12.3 s
          validation (baseline): point IoU 0.58 (0.21), AP 0.412 (0.150), F1 0.530 (0.310), AR@100 0.44 (0.31),
          7.3 masks an image (20.1), which has 6.9 objects; 6.0 s

    Args:
        printed: how the figures of a validation are shown, by column.
        baseline: the validation of the baseline, which epoch 0 is.
    """
    is_baseline = row["epoch"] == 0
    title = f"epoch {row['epoch']}" + (f"/{num_epochs}" if num_epochs else "")
    trained = [form.format(row[name]) for name, form in TRAINING_FORMS.items() if row.get(name) is not None]
    line = " ".join([title, f"step {row['step']}", *trained])
    known = {} if is_baseline or not baseline else baseline
    measured = [
        form.format(row[name]) + (f" ({_bare(form).format(known[name])})" if name in known else "")
        for name, form in printed.items()
        if row.get(name) is not None
    ]
    if not measured:
        return line
    objects, seconds = row.get("val_generator_objects"), row.get("validation_seconds")
    what = "baseline, the weights that training starts from" if is_baseline else "validation"
    text = f"{what}{' (baseline)' if known else ''}: {', '.join(measured)}"
    text += "" if objects is None else f", which has {objects:.1f} objects"
    text += "" if seconds is None else f"; {seconds:.1f} s"
    return text if is_baseline else f"{line}\n  {text}"


def _bare(form: str) -> str:
    """Return the part of a format that holds the number."""
    return form[form.index("{") : form.index("}") + 1]


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _format_number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def show_progress(items: Iterable, title: str, total: int, is_first_rank: bool) -> Iterable:
    """Return the items with a progress bar on the first rank, if it prints to a terminal."""
    is_quiet = not (is_first_rank and sys.stderr.isatty())
    return tqdm(items, desc=title, total=total, disable=is_quiet, leave=False)
