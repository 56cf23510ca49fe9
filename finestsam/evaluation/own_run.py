"""The run that weights come from: its split, its dataset and its metrics by epoch."""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from finestsam.config import Config
from finestsam.data.fingerprint import SPLIT, read_sides
from finestsam.data.split import DIGITS
from finestsam.errors import Defect, name_count, printable
from finestsam.model.card import GOALS
from finestsam.model.load import LoadedModel, find_run_weights
from finestsam.records import Record
from finestsam.runtime.plain_yaml import read_yaml
from finestsam.runtime.value_types import read_number

SETTINGS_NAME = "config.yaml"
NAMED = 5


@dataclass(frozen=True)
class OwnRun:
    """A run folder and its split.

    Attributes:
        sides: under `train` and `val` the beginnings of the images' digests, as `read_sides` returns them.
        goal: what the run tuned thresholds for; empty: it is not known.
    """

    folder: Path
    sides: dict[str, frozenset[str]]
    goal: str = ""

    def list_sides(self, records: list[Record]) -> list[str]:
        """Return for each image whether the run trained on it (train), was validated on it (val), or neither ("")."""
        return [
            next((side for side in ("train", "val") if record.digest[:DIGITS] in self.sides[side]), "")
            for record in records
        ]

    def list_learned(self, records: list[Record]) -> list[str]:
        """Return the file names of the images that the run trained on."""
        sides = self.list_sides(records)
        return [record.file_name for record, side in zip(records, sides, strict=True) if side == "train"]


def find_own_run(config: Config) -> OwnRun | None:
    """Return the run that the evaluated weights come from; None where they are in no run folder."""
    if config.evaluate.predictions:
        return None
    path = find_run_weights(config)
    for folder in (path.parent, path.parent.parent) if path else ():  # an adapter has a folder of its own
        if (sides := read_sides(folder)) is not None:
            return OwnRun(folder, sides, _read_goal(folder))
    return None


def _read_goal(folder: Path) -> str:
    """Return what a run tuned thresholds for, from its settings; empty: nothing was tuned, or it is not known."""
    try:
        settings = read_yaml(folder / SETTINGS_NAME)["evaluate"]
        goal, is_tuned = settings["goal"], settings["search"] is not False
    except (Defect, KeyError, TypeError):
        return ""
    return goal if goal in GOALS and is_tuned else ""


def describe_images(run: OwnRun | None, records: list[Record]) -> str:
    """Return how many images are evaluated, and whether the weights' run trained or validated on them."""
    count = name_count(len(records), "image")
    sides = set(run.list_sides(records)) if run else set()
    if sides == {"val"}:
        return f"{count}, the validation split of {printable(run.folder / SPLIT)}"
    if run and "train" not in sides:
        return f"{count}, none of which {printable(run.folder)} was trained on"
    return count


def warn_of_learned(run: OwnRun | None, records: list[Record]) -> str:
    """Return a warning about images that the weights were trained on; empty: there are none."""
    names = run.list_learned(records) if run else []
    if not names:
        return ""
    listed = ", ".join(map(printable, names[:NAMED])) + (f" and {len(names) - NAMED} more" * (len(names) > NAMED))
    return (
        f"{len(names)} of the {len(records)} images were trained on; expect lower figures on other images: {listed} "
        "(column trained_on of per_image.csv)"
    )


METRICS_NAME = "metrics.csv"


@dataclass(frozen=True)
class History:
    """The epochs of a run; epoch 0 is the baseline.

    Attributes:
        rows: of metrics.csv, by column; None where nothing was measured. `epoch` is the number of the epoch.
        kept_epoch: the epoch of the weights; None: it is not known.
    """

    rows: list[dict[str, float | None]]
    kept_epoch: float | None = None

    def trace(self, name: str) -> tuple[list[float], list[float]]:
        """Return the epochs in which a figure was measured, and its values."""
        points = [(row["epoch"], row[name]) for row in self.rows if row.get(name) is not None]
        return [epoch for epoch, _ in points], [value for _, value in points]


def read_history(loaded: LoadedModel) -> History | None:
    """Return the history of weights that lie in a run folder; None for others."""
    if loaded.card is None or not (path := loaded.path.parent / METRICS_NAME).is_file():
        return None
    try:
        rows = _read_rows(path)
    except (OSError, ValueError, csv.Error) as error:
        print(f"no training curves: {printable(path)} is not as training wrote it ({error})", file=sys.stderr)
        return None
    kept = [row["epoch"] for row in rows if row.get("step") == loaded.card.step]
    return History(rows, kept[0] if kept else None)


def _read_rows(path: Path) -> list[dict[str, float | None]]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, restkey="?"))
    if not all(line.get("epoch") and "?" not in line for line in lines):
        raise ValueError("a row without an epoch, or longer than the first")
    return [{name: read_number(value) if value else None for name, value in line.items()} for line in lines]
