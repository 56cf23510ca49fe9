"""Train one stage: finestsam's training, with a step that teaches affinities, alone or beside the masks.

`python -m recipes.builtin_weights.train alone --dataset path ...`, or `beside`; the flags are those of
`python -m finestsam --mode train`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from finestsam.batch import Sample
from finestsam.cli import parse_command_line
from finestsam.errors import UserError
from finestsam.model.sam import FinestSam
from finestsam.runtime.signals import Interrupted
from finestsam.training.image_step import ImageStepper
from finestsam.training.log import COLUMNS, VALIDATION_COLUMNS
from finestsam.training.step import Stepper
from finestsam.training.train import train
from recipes.builtin_weights.affinity import AffinityHead, compute_affinity_loss

AFFINITY_RATIO = 3  # weight of the affinities beside the losses of masks


@dataclass
class AffinityStepper(ImageStepper):
    """A step of an image encoder that learns affinities alone; the settings are to freeze the rest."""

    measures: ClassVar[tuple[str, ...]] = ("total_loss",)
    columns: ClassVar[tuple[str, ...]] = (*COLUMNS[:5], *measures, *VALIDATION_COLUMNS)

    @classmethod
    def build_training_head(cls, model: FinestSam) -> AffinityHead:
        return build_head(model)

    def compute_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor:
        return compute_losses(self.model, embeddings, samples)[:, None]


@dataclass
class MaskStepper(Stepper):
    """A step that learns masks, and affinities beside them."""

    @classmethod
    def build_training_head(cls, model: FinestSam) -> AffinityHead:
        return build_head(model)

    def take_auxiliary_loss(self, embeddings: Tensor, samples: list[Sample]) -> Tensor:
        """Return the weighted sum over objects, each with the loss of its image."""
        counts = torch.tensor([sample.object_count for sample in samples], device=embeddings.device)
        return AFFINITY_RATIO * (compute_losses(self.model, embeddings, samples) * counts).sum()


STEPPERS = {"alone": AffinityStepper, "beside": MaskStepper}


def build_head(model: FinestSam) -> AffinityHead:
    return AffinityHead(model.sam.prompt_encoder.embed_dim)


def compute_losses(model: FinestSam, embeddings: Tensor, samples: list[Sample]) -> Tensor:
    """Return the affinity loss of each image, B, from its embedding, B x C x g x g."""
    labels = torch.stack([sample.cells for sample in samples])
    return compute_affinity_loss(model.training_head(embeddings), labels)


def train_stage(stepper_kind: type[Stepper], arguments: Sequence[str]) -> int:
    """Train as the arguments of `finestsam --mode train` say, and return the exit code.

    Raises:
        SystemExit: the settings or the data cannot be used; with one line per problem.
    """
    try:
        _, config = parse_command_line(["--mode=train", *arguments])
        return train(config, stepper_kind)
    except UserError as error:
        raise SystemExit(str(error)) from None
    except Interrupted as error:
        return error.exit_code


if __name__ == "__main__":
    if sys.argv[1:2] not in ([name] for name in STEPPERS):
        raise SystemExit(f"name the step first, one of {', '.join(STEPPERS)}, then the flags of finestsam --mode train")
    sys.exit(train_stage(STEPPERS[sys.argv[1]], sys.argv[2:]))
