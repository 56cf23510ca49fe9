"""What a run has learned and how far it has come: everything that is needed to continue it exactly."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from finestsam.model.sam import FinestSam
from finestsam.tasks.base import Validation
from finestsam.training.random_state import random_state, restore_random_state


@dataclass
class Progress:
    """How far a run has come: what is saved beside weights, optimizer and scheduler to continue exactly."""

    epoch: int = 0  # complete ones
    batches_done: int = 0  # per rank, of the epoch that runs
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch that runs
    objects: int = 0  # behind the sums
    seconds: float = 0.0  # of the epoch that runs, without its validation
    validation_seconds: float = 0.0  # of the newest validation
    skipped_steps: int = 0  # in a row, because loss or gradient was not finite
    all_skipped_steps: int = 0  # of the run
    best: dict[str, float] | None = None  # the figures of the best weights
    is_blended: bool = False  # whether putting original weights back into these best ones has been tried
    baseline: dict[str, float] = field(default_factory=dict)
    baseline_generator: dict[str, Any] = field(default_factory=dict)  # thresholds that did best for the baseline
    metrics: dict[str, float] = field(default_factory=dict)  # of the newest validation
    generator: dict[str, Any] = field(default_factory=dict)  # settings that did best in it, for best.json
    tuned_on: int = 0  # images that they were chosen on
    evaluations_without_better: int = 0
    lost_best: str = ""  # why best.pth does not hold the best weights
    chunk_objects: int | None = None
    started_from: str = ""
    started_from_sha256: str | None = None

    def take_validation(self, validation: Validation | None) -> None:
        """Note what the validation of an epoch has measured; None: the epoch had none."""
        self.metrics = dict(validation.metrics) if validation else {}
        self.validation_seconds = validation.seconds if validation else 0.0
        if validation:
            self.generator, self.tuned_on = dict(validation.generator), validation.tuned_on

    def take_step(self, sums: dict[str, float], objects: int) -> None:
        self.skipped_steps = 0
        self.step += 1
        self.objects += objects
        for name, value in sums.items():
            self.sums[name] += value

    def begin_epoch(self, measures: Iterable[str]) -> None:
        self.batches_done, self.objects, self.seconds = 0, 0, 0.0
        self.sums = dict.fromkeys(measures, 0.0)

    @property
    def means(self) -> dict[str, float]:
        """What the epoch that runs has measured so far; empty before its first step."""
        return {name: value / self.objects for name, value in self.sums.items()} if self.objects else {}


@dataclass
class RunState:
    """What changes while a run learns, and what last.ckpt holds of it. The random states are those of this process."""

    model: FinestSam
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    progress: Progress

    def state_dict(self) -> dict[str, Any]:
        heads = {name: head.state_dict() for name, head in self.model.heads.items()}
        return heads | {
            "model": self.model.sam.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "random": random_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint, whose SAM and progress are loaded already.

        Raises:
            RuntimeError, or one of VALUE_ERRORS: it is one of other weights.
        """
        for name, head in self.model.heads.items():
            head.load_state_dict(saved[name])
        self.optimizer.load_state_dict(saved["optimizer"])
        _check_moments(self.optimizer)
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        restore_random_state(saved["random"])


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError unless what an optimizer remembers of each weight has the weight's shape."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            for name, value in optimizer.state.get(weight, {}).items():
                if name != "step" and value.shape != weight.shape:
                    raise ValueError(f"{name} has the shape {list(value.shape)}, its weight {list(weight.shape)}")
