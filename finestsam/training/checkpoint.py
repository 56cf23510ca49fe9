"""What a run keeps on disk: its checkpoints and its best weights.

Whatever happens while a file is written (a kill, a full disk), a whole one is there before and after.
"""

import math
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finestsam.errors import UserError
from finestsam.model.classes import ClassHead
from finestsam.model.saving import is_damaged, save_file, save_weights
from finestsam.model.semantic_head import SemanticHead

LAST = "last.ckpt"  # everything needed to continue
PREVIOUS = "last.prev.ckpt"  # the one before, for the day on which the last one is damaged
BESIDE_WEIGHTS = (".json", SemanticHead.SUFFIX, ClassHead.SUFFIX)  # what lies beside a file of weights, under its name


def save_last(path: Path, state: dict) -> None:
    """Write last.ckpt and keep the one before it as last.prev.ckpt."""
    save_file(path, state, previous=path.with_name(PREVIOUS))


def load_state(folder: Path) -> dict[str, Any]:
    """Return what last.ckpt holds, on the CPU; where it is damaged, what last.prev.ckpt holds, with a warning.

    Raises:
        UserError: neither can be read.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() and not previous.exists():
        raise UserError(f"{folder}: there is no {LAST} to resume from")
    try:
        return _read_state(last)
    except UserError as error:
        reason = str(error)
    try:
        state = _read_state(previous)
    except UserError as error:
        raise UserError(f"{reason}; {error}; no checkpoint is left to resume from") from None
    print(f"warning: {reason}; resuming from {PREVIOUS}, the checkpoint before it", file=sys.stderr)
    return state


def _read_state(path: Path) -> dict[str, Any]:
    try:
        if not path.exists():
            raise UserError(f"{path} is missing")
        if is_damaged(path):
            raise UserError(f"{path} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        # Without torch's own text: it recommends weights_only=False, which runs the code.
        raise UserError(f"{path} contains code, refused") from None
    except (RuntimeError, ValueError, KeyError):
        raise UserError(f"{path} is not a checkpoint that torch can read") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not the state of a run")
    return state


class TopWeights:
    """The best weights of a run, in files named {step}-{best_metric}.pth; best.pth is another file.

    Args:
        count: how many are kept.
    """

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.count = count
        self._metrics: dict[str, float] = {}  # by file name

    def save(self, state_dict: Mapping[str, Tensor], step: int, metric: float) -> Path | None:
        """Write the weights if they are among the best, drop what no longer is, and return the path or None."""
        if not math.isfinite(metric):
            return None
        name = f"{step}-{metric:.2f}.pth"
        others = {other: value for other, value in self._metrics.items() if _step_of(other) != step}
        # Of equals the earlier one: it was good first.
        ranked = sorted((others | {name: metric}).items(), key=lambda item: (-item[1], _step_of(item[0])))
        kept = dict(ranked[: self.count])
        if name not in kept:
            return None
        save_weights(self.folder / name, state_dict)
        for dropped in self._metrics.keys() - kept.keys():
            (self.folder / dropped).unlink(missing_ok=True)
            for suffix in BESIDE_WEIGHTS:
                (self.folder / dropped).with_suffix(suffix).unlink(missing_ok=True)
        self._metrics = kept
        return self.folder / name

    def state_dict(self) -> dict[str, float]:
        return dict(self._metrics)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up the files that are there; the state knows their metric to more digits than their names."""
        names = {path.name for path in self.folder.glob("*.pth") if re.fullmatch(r"\d+-\d+\.\d\d\.pth", path.name)}
        self._metrics = {name: state.get(name, float(Path(name).stem.split("-")[1])) for name in sorted(names)}


def _step_of(name: str) -> int:
    return int(name.partition("-")[0])
