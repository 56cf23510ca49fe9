"""What a run keeps on disk: its checkpoints and its best weights.

Whatever happens while a file is written (a kill, a full disk), a whole one is there before and after.
"""

import errno
import math
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finestsam.errors import UserError
from finestsam.model import classes, semantic_head
from finestsam.whole_files import replacing

LAST = "last.ckpt"  # everything needed to continue
PREVIOUS = "last.prev.ckpt"  # the one before, for the day on which the last one is damaged
BESIDE_WEIGHTS = (".json", semantic_head.SUFFIX, classes.SUFFIX)  # what lies beside a file of weights, under its name
WRAPPERS = ("module", "_forward_module", "_orig_mod", "model", "sam")  # parts of names that are not SAM's


class CheckpointNotSaved(OSError):
    """The disk is full or fails; what was there before is untouched, and training can go on."""


def save_last(path: Path, state: dict) -> None:
    """Write last.ckpt and keep the one before it as last.prev.ckpt."""
    save_file(path, state, previous=path.with_name(PREVIOUS))


def save_weights(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write a plain SAM state dict, which segment_anything's sam_model_registry loads on any machine."""
    save_file(path, {_unwrap_name(name): _plain_tensor(tensor) for name, tensor in state_dict.items()})


def _unwrap_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _plain_tensor(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    plain = tensor.detach().to("cpu", dtype).contiguous()
    # torch.save writes all the memory that a view looks into.
    return plain.clone() if plain.untyped_storage().nbytes() > plain.nbytes else plain


def save_file(path: Path, content: object, previous: Path | None = None) -> None:
    """Write a file with torch.save, beside the old one, which it replaces only when it is safe on the disk.

    Args:
        previous: the name that the old one gets; None: it goes.

    Raises:
        CheckpointNotSaved: the disk is full or fails.
    """
    needed = int(1.1 * _count_bytes(content))
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with replacing(path, previous) as partial:
            _write_verified(partial, content)
    except (OSError, RuntimeError) as error:
        # torch says "unexpected pos 768 vs 662" while it handles the error of the disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointNotSaved(_describe_failure(cause, path.parent, needed)) from None


def _count_bytes(content: object) -> int:
    """Return how much the tensors take up in a file."""
    if isinstance(content, Tensor):
        return content.untyped_storage().nbytes()
    if isinstance(content, Mapping):
        return sum(_count_bytes(value) for value in content.values())
    return sum(map(_count_bytes, content)) if isinstance(content, list | tuple) else 0


def _write_verified(path: Path, content: object) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if path.stat().st_size != size or _is_damaged(path):
        raise OSError(errno.EIO, "the file does not read back as it was written")


def _is_damaged(path: Path) -> bool:
    """Whether the checksums of a file of torch.save are wrong, which torch.load does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, EOFError, NotImplementedError):
        return True


def _describe_failure(error: OSError, folder: Path, needed: int) -> str:
    free = "nothing"
    with suppress(OSError):
        free = _format_size(shutil.disk_usage(folder).free)
    reason = error.strerror or error
    return f"checkpoint not saved: {reason} (need {_format_size(needed)}, free {free} at {folder})"


def _format_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


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
        if _is_damaged(path):
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
