"""Train one stage: finestsam's training, with a task that teaches affinities, alone or beside the masks.

`python -m recipes.builtin_weights.train alone --dataset path ...`, or `beside`; the flags are those of
`python -m finestsam --mode train`.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from finestsam.batch import Sample
from finestsam.cli import parse_command_line
from finestsam.data.cells import label_cells
from finestsam.data.dataset import SampleSettings
from finestsam.data.read import LabelledSet
from finestsam.errors import UserError
from finestsam.model.load import LoadedModel
from finestsam.runtime.signals import Interrupted
from finestsam.tasks.base import Task
from finestsam.tasks.masks import MasksTask
from finestsam.training.train import train
from recipes.builtin_weights.affinity import AffinityHead, compute_affinity_loss

AFFINITY_RATIO = 3  # weight of the affinities beside the losses of masks


class MasksAndAffinities(MasksTask):
    """Masks, and affinities beside them, from a head that only training has."""

    def begin_training(self, loaded: LoadedModel, data: LabelledSet, names: Sequence[str] | None) -> None:
        super().begin_training(loaded, data, names)
        self.model.training_head = AffinityHead(self.model.sam.prompt_encoder.embed_dim).to(self.model.device)

    def choose_targets(self, settings: SampleSettings) -> SampleSettings:
        return replace(super().choose_targets(settings), label_cells=label_cells)

    def sum_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor | float:
        counts = torch.tensor([sample.object_count for sample in samples], device=embeddings.device)
        affinities = AFFINITY_RATIO * (self.measure_affinities(embeddings, samples) * counts).sum()
        return affinities + super().sum_image_losses(embeddings, samples)

    def measure_affinities(self, embeddings: Tensor, samples: list[Sample]) -> Tensor:
        """Return the affinity loss of each image, B, from its embedding, B x C x g x g."""
        labels = torch.stack([sample.cells for sample in samples])
        return compute_affinity_loss(self.model.training_head(embeddings), labels)


class AffinitiesAlone(MasksAndAffinities):
    """Affinities alone: the image encoder learns, and the settings are to freeze the rest."""

    measures: ClassVar[dict[str, str]] = {"total_loss": "Total loss"}
    decodes_masks = False

    def compute_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor:
        return self.measure_affinities(embeddings, samples)[:, None]


TASKS = {"alone": AffinitiesAlone, "beside": MasksAndAffinities}


def train_stage(task: type[Task], arguments: Sequence[str]) -> int:
    """Train as the arguments of `finestsam --mode train` say, and return the exit code.

    Raises:
        SystemExit: the settings or the data cannot be used; with one line per problem.
    """
    try:
        _, config = parse_command_line(["--mode=train", *arguments])
        return train(config, task)
    except UserError as error:
        raise SystemExit(str(error)) from None
    except Interrupted as error:
        return error.exit_code


if __name__ == "__main__":
    if sys.argv[1:2] not in ([name] for name in TASKS):
        raise SystemExit(f"name the task first, one of {', '.join(TASKS)}, then the flags of finestsam --mode train")
    sys.exit(train_stage(TASKS[sys.argv[1]], sys.argv[2:]))
