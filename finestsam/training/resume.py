"""Check a checkpoint before a run continues: is it valid, and which settings may change."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finestsam.config import IMAGE_SIZE_RANGE, PATCH_SIZE, Config, flatten_config
from finestsam.data.fingerprint import SPLIT, belongs_to, list_changes, read_fingerprint
from finestsam.errors import VALUE_ERRORS, UserError
from finestsam.model.architectures import ARCHITECTURES, build_sam
from finestsam.model.card import find_generator_problem
from finestsam.runtime.value_types import find_misfit, fits
from finestsam.training import checkpoint
from finestsam.training.random_state import check_random_state

# If these change, the weights, the optimizer or the schedule of the checkpoint no longer fit.
FIXED = (
    "model.", "model_layer.freeze.", "model_layer.thaw.", "model_layer.lora.",
    "model_layer.fft_attention.blocks", "task", "opt.rates.",
    "sched.type",
)  # fmt: skip
# Settings of the optimizer, which the checkpoint restores.
KEPT = ("opt.learning_rate", "opt.weight_decay", "opt.head_learning_rate")
# The dataset's settings that a step depends on. The others decide which data there are; `refuse_other_dataset` compares
# the data.
SAMPLING = tuple(
    f"dataset.{name}"
    for name in (
        "positive_points", "negative_points", "prompts_per_object", "background_points", "use_center", "snap_to_grid",
        "max_objects", "labels",
    )
)  # fmt: skip
# Settings that do not change what is learned: duration, place and hardware of a run.
FREE = (
    "preset", "num_epochs", "max_steps", "early_stop_evaluations", "num_workers", "device", "num_devices", "num_nodes",
    "sav_dir", "run_name", "out_dir", "resume", "input", "strict", "dataset.", "store.",
    "check.", "convert.", "opacity", "model_layer.recompute_encoder",
)  # fmt: skip


# The entries of a checkpoint and their types.
STATE = {
    "model_type": str, "image_size": int, "model": dict[str, Tensor], "optimizer": dict, "scheduler": dict,
    "scaler": dict, "progress": dict, "random": dict, "config": str, "dataset": str,
}  # fmt: skip
MAY_BE_MISSING = {"categories": list[str] | None, "images_per_batch": int}
HEAD = dict[str, Tensor] | None  # of what is saved under the name of a head, which ends so:
HEAD_ENDING = "_head"


def load_state(folder: Path, progress_kind: type) -> dict[str, Any] | None:
    """Return the newest checkpoint of a run that can be continued; None where it was stopped before its first.

    Args:
        progress_kind: the dataclass of its progress.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    if any((folder / name).exists() for name in (checkpoint.LAST, checkpoint.PREVIOUS)):
        return checkpoint.load_state(folder, lambda state: _take_up(state, progress_kind))
    return None


def _take_up(state: dict[str, Any], progress_kind: type) -> str | None:
    """Give the entries of a checkpoint today's names, in place; then return what `find_problem` does."""
    progress = state.get("progress")
    for entries, old, new in ((state, "pictures_per_batch", "images_per_batch"), (progress, "floor", "baseline")):
        if isinstance(entries, dict) and old in entries:
            entries[new] = entries.pop(old)
    return find_problem(state, progress_kind)


def find_problem(state: dict[str, Any], progress_kind: type) -> str | None:
    """Return what is wrong with a checkpoint, in words; None: nothing."""
    if state.get("affinity_head") is not None:
        return "it was trained on affinities, which only the recipe of the built-in weights does now"
    for name, kind in (STATE | MAY_BE_MISSING).items():
        if name not in state and name in STATE:
            return f"{name} is missing"
        if name in state and not fits(state[name], kind):
            return f"{name} is a {type(state[name]).__name__} of another kind"
    heads = {name: value for name, value in state.items() if str(name).endswith(HEAD_ENDING)}
    for name, value in heads.items():
        if not fits(value, HEAD):
            return f"{name} is a {type(value).__name__} of another kind"
    if state.get("images_per_batch", 1) < 1:
        return f"images_per_batch is {state['images_per_batch']}"
    problem = find_misfit(state["progress"], progress_kind, finite=False)
    problem = problem or find_generator_problem(state["progress"].get("generator", {}))
    problem = problem or _find_negative(state["progress"])
    if problem:
        return f"progress: {problem}"
    try:
        before = json.loads(state["config"])
        if not before or not fits(before, dict[str, Any]):
            return "config holds no settings by their names"
        check_random_state(state["random"])
        _check_optimizer(state["optimizer"])
        _check_scheduler(state["scheduler"])
        _check_shapes(state)
    except UserError as error:
        return str(error)
    except (RuntimeError, *VALUE_ERRORS) as error:
        return f"{' '.join(str(error).split()) or type(error).__name__:.200}"
    return None


def _find_negative(progress: dict[str, Any]) -> str | None:
    counts = {name: value for name, value in progress.items() if isinstance(value, int | float)}
    return next((f"{name} is {value}" for name, value in counts.items() if value < 0), None)


def _check_optimizer(state: dict[str, Any]) -> None:
    """Raise unless an optimizer's state is of the kind that torch saves."""
    if not fits(state["state"], dict[int, dict[str, Any]]) or not fits(state["param_groups"], list[dict[str, Any]]):
        raise ValueError("optimizer is of another kind")
    for group in state["param_groups"]:
        if (
            not fits(group["params"], list[int])
            or not fits(group["lr"], float)
            or not fits(group["weight_decay"], float)
        ):
            raise ValueError("optimizer has a group of another kind")


def _check_scheduler(state: dict[str, Any]) -> None:
    """Raise unless a schedule's number of steps is a whole number."""
    if not fits(state["last_epoch"], int) or not fits(state.get("_last_lr", []), list[float]):
        raise ValueError("scheduler is of another kind")


def _check_shapes(state: dict[str, Any]) -> None:
    """Raise unless the weights are of the type and the size of images that stand beside them."""
    if state["model_type"] not in ARCHITECTURES:
        raise ValueError(f"model_type is {state['model_type']!r:.60}")
    low, high = IMAGE_SIZE_RANGE
    if not low <= state["image_size"] <= high or state["image_size"] % PATCH_SIZE:
        raise ValueError(f"image_size is {state['image_size']}")
    with torch.device("meta"):
        expected = build_sam(state["model_type"], state["image_size"]).state_dict()
    for name, value in expected.items():
        known = state["model"].get(name)
        if known is None and ".attn." not in name:  # attention may have been replaced
            raise ValueError(f"model has no {name}")
        if known is not None and known.shape != value.shape:
            raise ValueError(f"model: {name} has the shape {list(known.shape)}, expected {list(value.shape)}")


def check_settings(config: Config, state: dict[str, Any], images_per_batch: int) -> None:
    """Compare the settings with those of the checkpoint, and warn which ones apply where they differ.

    Args:
        images_per_batch: of all ranks together.

    Raises:
        UserError: a difference with which the run cannot go on.
    """
    before, now = json.loads(state["config"]), json.loads(json.dumps(flatten_config(config), allow_nan=False))
    changed = [name for name in now if name in before and now[name] != before[name]]
    refused = [name for name in changed if name.startswith(FIXED)]
    if now["opt.keep_original"] != 0 and before.get("opt.keep_original") == 0:
        refused.append("opt.keep_original")  # the starting weights are only kept if this is set from the first step on
    if refused:
        found = "\n".join(f"--resume: {name} is {now[name]}, the run has {before[name]}" for name in refused)
        raise UserError(f"{found}; start a new run with it, from best.pth if its weights are wanted")
    for name in changed:
        if name in KEPT:
            _warn(f"{name} {now[name]}: the run goes on with {before[name]}, which its optimizer holds")
        elif name in SAMPLING or not name.startswith(FREE):
            _warn(f"{name}: {now[name]} from here on, {before[name]} before")
    steps = config.sched.LambdaLR.steps
    if config.sched.type == "LambdaLR" and any(step < 1 for step in steps) and {"num_epochs", "max_steps"} & {*changed}:
        _warn(
            f"sched.LambdaLR.steps {steps} are shares of a run that is of another length now: the learning rate may "
            "rise or fall from here on"
        )
    known = state.get("images_per_batch", images_per_batch)
    if known != images_per_batch:
        _warn(f"{images_per_batch} images a step from here on, {known} before: not what an unbroken run learns")


def refuse_other_dataset(folder: Path, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise unless the data are those that the run was trained on; the message says what has changed.

    Args:
        now: their fingerprint.
    """
    if belongs_to(now, state["dataset"]):
        return
    try:
        before = read_fingerprint(folder / SPLIT)
        is_its_own = belongs_to(before, state["dataset"])
        changes = list_changes(before, now) or ["the order of the images"] if is_its_own else []
    except (OSError, *VALUE_ERRORS):
        changes = []
    shown = f" ({'; '.join(changes)})" if changes else ""
    raise UserError(f"--resume: the dataset is not the one that the run was trained on{shown}; start a new run with it")


def convert_batches(batches: int, before: int, now: int) -> int:
    """Return how many whole batches of `now` images fit into `batches` batches of `before` images."""
    return batches if before == now else batches * before // now


def _warn(text: str) -> None:
    print(f"warning: --resume: {text}", file=sys.stderr)
