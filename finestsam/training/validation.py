"""Validation during training: what `--mode evaluate` measures, on the validation images, shared by the ranks."""

import math
import time
from dataclasses import replace

from finestsam.tasks.base import Validation, ValidationSet
from finestsam.training.log import show_progress
from finestsam.training.run import Run


def validate(run: Run) -> Validation:
    """Measure the validation images; nothing where there are none.

    Raises:
        Interrupted: a signal came to any rank.
    """
    if run.val_loader is None:
        return Validation()
    started = time.perf_counter()
    batches = show_progress(run.val_loader, "validation", len(run.val_loader), run.is_first_rank)
    given = ValidationSet(run.data.val, batches, run.stepper.embedder, run.stepper.chunk_objects, run.ranks)
    run.loaded.model.eval()
    found = run.task.validate(given)
    run.loaded.model.train()
    # What is no number ranks no weights, and json has no word for it.
    finite = {name: value for name, value in found.metrics.items() if math.isfinite(value)}
    return replace(found, metrics=finite, seconds=time.perf_counter() - started)
