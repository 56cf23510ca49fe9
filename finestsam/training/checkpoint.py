"""The files of a run: its checkpoints and its best weights.

A kill or a full disk never leaves half a file: the old file stays until the new one is complete.
"""

import math
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finestsam.errors import VALUE_ERRORS, UserError
from finestsam.model.saving import is_damaged, save_file, save_weights
from finestsam.model.weights import refuse_inflated

LAST = "last.ckpt"  # everything needed to continue
PREVIOUS = "last.prev.ckpt"  # the one before, for the day on which the last one is damaged


def save_last(path: Path, state: dict) -> None:
    """Write last.ckpt and keep the one before it as last.prev.ckpt."""
    save_file(path, state, previous=path.with_name(PREVIOUS))


def load_state(folder: Path, find_problem: Callable[[dict[str, Any]], str | None] | None = None) -> dict[str, Any]:
    """Return the content of last.ckpt, on the CPU; if it is damaged, that of last.prev.ckpt, with a warning.

    Args:
        find_problem: returns why a run cannot continue from a state; None: it can.

    Raises:
        UserError: neither can be read.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() and not previous.exists():
        raise UserError(f"{folder}: there is no {LAST} to resume from")
    try:
        return _read_state(last, find_problem)
    except UserError as error:
        reason = str(error)
    try:
        state = _read_state(previous, find_problem)
    except UserError as error:
        raise UserError(f"{reason}; {error}; no checkpoint is left to resume from") from None
    print(f"warning: {reason}; resuming from {PREVIOUS}, the checkpoint before it", file=sys.stderr)
    return state


def _read_state(path: Path, find_problem: Callable[[dict[str, Any]], str | None] | None) -> dict[str, Any]:
    try:
        if not path.is_file():  # also False for pipes, which would hang
            raise UserError(f"{path} is {'not a regular file' if path.exists() else 'missing'}")
        if is_damaged(path):
            raise UserError(f"{path} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        # Without torch's own text: it recommends weights_only=False, which runs the code.
        raise UserError(f"{path} contains code, refused") from None
    except (RuntimeError, EOFError, MemoryError, *VALUE_ERRORS):
        raise UserError(f"{path} is not a checkpoint that torch can read") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not the state of a run")
    if any(value.layout != torch.strided for value in _list_tensors(state)):
        raise UserError(f"{path} holds sparse tensors, not the state of a run")
    refuse_inflated(path, _list_tensors(state))
    problem = find_problem(state) if find_problem else None
    if problem:
        raise UserError(f"{path} is not the state of a run of this version of finestsam: {problem}")
    return state


def _list_tensors(content: object) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from _list_tensors(part)


class TopWeights:
    """The best weights of a run, in files named {step}-{best_metric}.pth; best.pth is another file.

    Args:
        count: how many are kept.
        suffixes: of the files that may lie beside one of them, under its name.
    """

    def __init__(self, folder: Path, count: int, suffixes: Sequence[str] = (".json",)):
        self.folder = folder
        self.count = count
        self.suffixes = suffixes
        self._metrics: dict[str, dict[str, float]] = {}  # by file name, all that was measured

    def save(
        self, state_dict: Mapping[str, Tensor], step: int, metrics: Mapping[str, float], best_metric: str
    ) -> Path | None:
        """Write the weights if they are among the best, remove those that no longer are, and return the path or None.

        A run may continue with another metric: existing files are ranked and renamed by the new one.
        """
        self._metrics = {self._rename(name, found, best_metric): found for name, found in self._metrics.items()}
        if not math.isfinite(metrics.get(best_metric, math.nan)):
            return None
        name = _name_weights(step, metrics[best_metric])
        others = {other: found for other, found in self._metrics.items() if _step_of(other) != step}
        # Of equal weights the earlier ones are kept.
        ranked = sorted(
            (others | {name: dict(metrics)}).items(),
            key=lambda item: (-_read_metric(*item, best_metric), _step_of(item[0])),
        )
        kept = dict(ranked[: self.count])
        if name not in kept:
            return None
        save_weights(self.folder / name, state_dict)
        for dropped in self._metrics.keys() - kept.keys():
            for path in self._list_files(dropped):
                path.unlink(missing_ok=True)
        self._metrics = kept
        return self.folder / name

    def state_dict(self) -> dict[str, dict[str, float]]:
        return dict(self._metrics)

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Take over the existing files; of a file written after the state only the metric in its name is known."""
        names = {path.name for path in self.folder.glob("*.pth") if re.fullmatch(r"\d+-\d+\.\d\d\.pth", path.name)}
        self._metrics = {name: state.get(name, {}) for name in sorted(names)}

    def _rename(self, name: str, metrics: Mapping[str, float], best_metric: str) -> str:
        """Rename weights by a metric, if it was measured for them, and return the name of their file."""
        new = _name_weights(_step_of(name), metrics[best_metric]) if best_metric in metrics else name
        if new != name:
            for path, renamed in zip(self._list_files(name), self._list_files(new), strict=True):
                if path.exists():
                    path.replace(renamed)
        return new

    def _list_files(self, name: str) -> list[Path]:
        """Return the file of weights, and after it what may lie beside it."""
        return [self.folder / name, *((self.folder / name).with_suffix(suffix) for suffix in self.suffixes)]


def _read_metric(name: str, metrics: Mapping[str, float], best_metric: str) -> float:
    """Return the metric that weights are ranked by."""
    return metrics.get(best_metric, -math.inf) if metrics else float(Path(name).stem.split("-")[1])


def _name_weights(step: int, metric: float) -> str:
    return f"{step}-{metric:.2f}.pth"


def _step_of(name: str) -> int:
    return int(name.partition("-")[0])
