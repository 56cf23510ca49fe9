"""The fixed parts of a run: what it works with and does not replace while it learns."""

import json
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from finestsam.config import Config, flatten_config
from finestsam.data.dataset import StepSampler
from finestsam.data.loaders import end_workers
from finestsam.data.read import LabelledSet
from finestsam.model.load import LoadedModel
from finestsam.runtime.ranks import Ranks
from finestsam.tasks.base import Task
from finestsam.training.step import Stepper


@dataclass(frozen=True)
class Run:
    """What one run works with. What it has learned is its `RunState`, what it keeps on disk its `RunFolder`."""

    config: Config
    fabric: Fabric
    ranks: Ranks
    data: LabelledSet
    fingerprint: str  # of the data
    loaded: LoadedModel
    task: Task
    stepper: Stepper
    sampler: StepSampler
    train_loader: DataLoader
    val_loader: DataLoader | None  # None: nothing to validate on
    cost: list[str] = field(default_factory=list)  # of a step, for the screen

    @property
    def has_new_attention(self) -> bool:
        """Whether this run replaced attention of the weights that it started from."""
        return self.config.model_layer.fft_attention.blocks != "none"

    @property
    def is_first_rank(self) -> bool:
        return self.fabric.global_rank == 0

    def describe(self) -> dict[str, Any]:
        """Return what last.ckpt holds of the fixed parts, to tell whether a run can be continued."""
        return {
            "model_type": self.loaded.model_type,
            "image_size": self.loaded.model.image_size,
            "categories": self.task.class_names,
            "config": json.dumps(flatten_config(self.config), allow_nan=False),
            "dataset": self.fingerprint,
            "images_per_batch": self.config.batch_size * self.ranks.count,
        }

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        end_workers(self.train_loader)
