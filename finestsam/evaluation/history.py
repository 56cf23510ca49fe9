"""How weights were learnt, from the metrics.csv of the run folder that they lie in."""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from finestsam.errors import printable
from finestsam.model.load import LoadedModel
from finestsam.runtime.value_types import read_number

METRICS_NAME = "metrics.csv"


@dataclass(frozen=True)
class History:
    """The epochs of a run; epoch 0 is the baseline.

    Attributes:
        rows: figures by their names in metrics.csv, None where nothing was measured, under `epoch` its number.
        kept_epoch: the one that the weights are of; None: it is not known.
    """

    rows: list[dict[str, float | None]]
    kept_epoch: float | None = None

    def trace(self, name: str) -> tuple[list[float], list[float]]:
        """Return the epochs in which a figure was measured, and what was."""
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
