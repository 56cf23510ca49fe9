"""What a run that is continued may change, and what its checkpoint decides."""

import json
import sys
from pathlib import Path
from typing import Any

from finestsam.config import Config, flatten_config
from finestsam.data.fingerprint import SPLIT, hash_fingerprint, list_changes
from finestsam.errors import UserError
from finestsam.training import checkpoint

# Without these the weights, the optimizer or the schedule of the checkpoint fit no more.
FIXED = (
    "model.", "model_layer.freeze.", "model_layer.thaw.", "model_layer.lora.",
    "model_layer.fft_attention.blocks", "task", "opt.layer_decay", "opt.rates.",
    "sched.type",
)  # fmt: skip
# The optimizer's own, which its checkpoint brings along.
KEPT = ("opt.learning_rate", "opt.weight_decay", "semantic.head_learning_rate", "classes.head_learning_rate")
# Of the dataset's settings those that a step depends on; the others make the dataset, which is compared by itself.
SAMPLING = tuple(
    f"dataset.{name}"
    for name in (
        "positive_points", "negative_points", "prompts_per_object", "background_points", "use_center", "snap_to_grid",
        "min_area_pixels", "max_objects", "labels",
    )
)  # fmt: skip
# How long, where and with what a run computes changes nothing that it learns.
FREE = (
    "num_epochs", "max_steps", "early_stop_evaluations", "num_workers", "device", "num_devices", "num_nodes", "sav_dir",
    "run_name", "out_dir", "resume", "input", "strict", "keep_memory", "flush_denormals", "compile", "dataset.",
    "store.", "check.", "convert.", "opacity", "model_layer.recompute_encoder",
)  # fmt: skip


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the newest whole checkpoint of a run; None where it was stopped before its first.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    if any((folder / name).exists() for name in (checkpoint.LAST, checkpoint.PREVIOUS)):
        return checkpoint.load_state(folder)
    return None


def check_settings(config: Config, state: dict[str, Any], pictures_per_batch: int) -> None:
    """Compare the settings with those of the checkpoint, and say which win where they differ.

    Args:
        pictures_per_batch: of all ranks together.

    Raises:
        UserError: a difference with which the run cannot go on.
    """
    before, now = json.loads(state["config"]), json.loads(json.dumps(flatten_config(config), allow_nan=False))
    changed = [name for name in now if name in before and now[name] != before[name]]
    refused = [name for name in changed if name.startswith(FIXED)]
    if (now["losses.affinity_ratio"] > 0) != (before["losses.affinity_ratio"] > 0):
        refused.append("losses.affinity_ratio")
    parts = ("losses.focal_ratio", "losses.dice_ratio", "losses.iou_ratio")
    if any(now[name] for name in parts) != any(before[name] for name in parts):
        refused += [name for name in parts if name in changed]
    if now["opt.keep_original"] != 0 and before.get("opt.keep_original") == 0:
        refused.append("opt.keep_original")  # a run keeps what it started from only where this is set from the first on
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
    known = state.get("pictures_per_batch", pictures_per_batch)
    if known != pictures_per_batch:
        _warn(f"{pictures_per_batch} pictures a step from here on, {known} before: not what an unbroken run learns")


def refuse_other_dataset(folder: Path, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise unless the data are what the run was trained on, with what has changed.

    Args:
        now: their fingerprint.
    """
    if state["dataset"] == hash_fingerprint(now):
        return
    try:
        before = json.loads((folder / SPLIT).read_text(encoding="utf-8"))
        is_its_own = hash_fingerprint(before) == state["dataset"]
        changes = list_changes(before, now) or ["the order of the pictures"] if is_its_own else []
    except (OSError, ValueError):
        changes = []
    told = f" ({'; '.join(changes)})" if changes else ""
    raise UserError(f"--resume: the dataset is not the one that the run was trained on{told}; start a new run with it")


def convert_batches(batches: int, before: int, now: int) -> int:
    """Return how many batches of `now` pictures lie within what batches of `before` pictures have seen of an epoch."""
    return batches if before == now else batches * before // now


def _warn(text: str) -> None:
    print(f"warning: --resume: {text}", file=sys.stderr)
