"""The semantic task in training: its loss, its step, its validation. The loop is that of every run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from finestsam.batch import Sample
from finestsam.config import Config
from finestsam.data.semantic import BACKGROUND_NAME, IGNORED, ClassTable, match_classes, number_classes
from finestsam.evaluation.semantic_scores import summarize_pixels
from finestsam.model.heads import SemanticHead, load_semantic_head
from finestsam.model.load import LoadedModel
from finestsam.training.image_step import ImageStepper
from finestsam.training.log import SEMANTIC_COLUMNS, SEMANTIC_TRAINING_COLUMNS, SEMANTIC_VALIDATION_COLUMNS
from finestsam.training.losses import DICE_SMOOTH


@dataclass
class SemanticStepper(ImageStepper):
    """A step that learns the classes of pixels."""

    measures: ClassVar[tuple[str, ...]] = SEMANTIC_TRAINING_COLUMNS
    columns: ClassVar[tuple[str, ...]] = SEMANTIC_COLUMNS
    metric: ClassVar[str] = "val_miou"

    def compute_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor:
        labels = torch.stack([sample.classes for sample in samples])
        return measure_classes(self.model(embeddings, None), labels)


def measure_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Return of each image the loss, its parts cross-entropy and Dice, and the pixel accuracy, B x 4.

    Args:
        logits: B x K x H x W.
        labels: B x H x W, classes; places that are `IGNORED` count for nothing.
    """
    counted = labels != IGNORED
    counts = counted.sum(dim=(1, 2)).clamp(min=1)
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").sum(dim=(1, 2)) / counts
    parts = (cross_entropy, class_dice_loss(logits, labels))
    accuracy = ((logits.argmax(dim=1) == labels) & counted).sum(dim=(1, 2)) / counts
    return torch.stack([sum(parts), *parts, accuracy], dim=1)


def class_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - Dice of the probabilities, the mean over the classes that an image has, B; 0 where it has none.

    Source: Milletari et al., V-Net (arXiv 1606.04797), without its squares.
    """
    counted = (labels != IGNORED)[:, None]
    truth = F.one_hot(labels.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2) * counted  # B x K x H x W
    inside = logits.softmax(dim=1) * counted
    overlap, sizes = 2 * (inside * truth).sum(dim=(2, 3)), truth.sum(dim=(2, 3))
    dice = (overlap + DICE_SMOOTH) / (inside.sum(dim=(2, 3)) + sizes + DICE_SMOOTH)
    is_there = sizes > 0
    return ((1 - dice) * is_there).sum(dim=1) / is_there.sum(dim=1).clamp(min=1)


def choose_classes(
    config: Config, loaded: LoadedModel, categories: dict[int, str], names: Sequence[str] | None = None
) -> ClassTable:
    """Return the classes to train, and give the model a head for them: the one it has, or a new one.

    Args:
        categories: of the dataset, names by id.
        names: of the head's categories in a run that is continued; None: it begins.
    """
    ignores = config.dataset.labels == "partial"
    table = number_classes(categories, ignores)
    if names is not None:
        table = match_classes(categories, [BACKGROUND_NAME, *names], ignores)
    card, model = loaded.card, loaded.model
    if card and card.task == "semantic" and set(table.names) == set(card.classes):
        table = match_classes(categories, card.classes, ignores)
        head = load_semantic_head(loaded.path, card.classes, model.sam.prompt_encoder.embed_dim)
    else:
        head = SemanticHead(model.sam.prompt_encoder.embed_dim, len(table.names))
    model.semantic_head = head.to(model.device)
    return table


def summarize_validation(counts: np.ndarray, names: list[str]) -> dict[str, float]:
    """Return the figures for metrics.csv."""
    figures = summarize_pixels(counts, names)
    names = [name.removeprefix("val_") for name in SEMANTIC_VALIDATION_COLUMNS]
    return {f"val_{name}": figures[name] for name in names if name in figures}
