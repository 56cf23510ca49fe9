"""The task classes: masks with a category for each, or none, as no object."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from finestsam.batch import Predictions, Sample
from finestsam.config import Config
from finestsam.data.categories import list_category_ids, number_categories
from finestsam.data.cells import CROWD, label_cells
from finestsam.data.dataset import SampleSettings
from finestsam.data.read import LabelledSet
from finestsam.data.semantic import IGNORED, ClassTable
from finestsam.errors import printable
from finestsam.evaluation.class_scores import match_categories, refuse_strangers, score_classes
from finestsam.evaluation.generator_scores import Tuned
from finestsam.model.card import Card
from finestsam.model.heads import NO_OBJECT, ClassHead, load_class_head
from finestsam.model.load import LoadedModel
from finestsam.model.sam import FinestSam
from finestsam.records import Record
from finestsam.tasks.losses import ObjectLosses
from finestsam.tasks.masks import COUNT_COLUMN, MasksTask

# From this IoU on a mask is the object, as COCO counts it; below the other one it is none. Between them nobody can
# tell, and nothing is taught.
OBJECT_IOU, NO_OBJECT_IOU = 0.5, 0.3
# Of a mask, in a crowd region, from which on it may be one of the objects there.
CROWD_SHARE = 0.5
# The objects of a category weigh as their number in training to the power of minus this: 0 weighs all alike, and with 1
# every category counts the same.
BALANCE = 0.5


@dataclass
class ClassLosses(ObjectLosses):
    """With what the classes add to `total`: one value per object, N, without a gradient."""

    class_error: Tensor  # cross-entropy
    is_right: Tensor  # 1 where the mask that is trained got the object's category, else 0


class ClassesTask(MasksTask):
    """A step trains masks and the category of each.

    Attributes:
        class_weights: of each class in the cross-entropy, 1 + K.
    """

    name = "classes"
    measures: ClassVar[dict[str, str]] = MasksTask.measures | {
        "class_loss": "Class loss",
        "class_accuracy": "Class accuracy",
    }
    validation_columns: ClassVar[tuple[str, ...]] = (
        *MasksTask.validation_columns, "val_classes_ap", "val_classes_ap50", "val_classes_ar_100",
    )  # fmt: skip
    printed: ClassVar[dict[str, str]] = {
        **{name: form for name, form in MasksTask.printed.items() if name != COUNT_COLUMN},
        "val_classes_ap": "AP by category {:.3f}",
        "val_classes_ar_100": "AR@100 by category {:.3f}",
        COUNT_COLUMN: MasksTask.printed[COUNT_COLUMN],
    }
    default_metrics: ClassVar[dict[str, str]] = {"complete": "val_classes_ap", "partial": "val_classes_ar_100"}

    def __init__(self, config: Config, model: FinestSam):
        super().__init__(config, model)
        self.class_weights = torch.ones(0)

    def begin_training(self, loaded: LoadedModel, data: LabelledSet, names: Sequence[str] | None) -> None:
        """Take the head that the weights have, where it is for the same categories; else a new one."""
        table, card, model = number_categories(data.category_names, names), loaded.card, self.model
        if card and card.task == self.name and set(table.names[1:]) == set(card.categories):
            table = number_categories(data.category_names, card.categories)
            head = load_class_head(loaded.path, card.categories, model.sam.prompt_encoder.embed_dim)
        else:
            head = ClassHead(model.sam.prompt_encoder.embed_dim, len(table.names))
        model.class_head = head.to(model.device)
        self.table = table
        self.class_weights = weigh_classes(data.train, table)

    def choose_targets(self, settings: SampleSettings) -> SampleSettings:
        return replace(settings, label_cells=label_cells, categories=self.table)

    def compute_losses(self, predictions: Predictions, sample: Sample, first: int) -> ClassLosses:
        losses = super().compute_losses(predictions, sample, first)
        device, rows = losses.best.device, torch.arange(len(losses.best), device=losses.best.device)
        own = torch.tensor(sample.object_classes[first : first + len(rows)], device=device)
        targets = fit_classes(predictions.logits, sample)
        targets = torch.where((losses.ious >= NO_OBJECT_IOU) & (targets == NO_OBJECT), IGNORED, targets)
        targets = torch.where(losses.ious >= OBJECT_IOU, own[:, None], targets)
        targets[rows, losses.best] = own  # however bad: it is what the object has
        errors = self.measure_classes(predictions.class_logits, targets)
        class_error = _mean_best_and_others(errors, targets, losses.best)
        total = losses.total + class_error
        is_right = predictions.class_logits[rows, losses.best].argmax(dim=1) == own
        parts = {entry.name: getattr(losses, entry.name) for entry in fields(losses)} | {"total": total}
        return ClassLosses(**parts, class_error=class_error.detach(), is_right=is_right.float())

    def measure_classes(self, class_logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted cross-entropy of each mask, N x M; 0 where nothing is taught."""
        weights = self.class_weights.to(class_logits)
        return F.cross_entropy(class_logits.transpose(1, 2), targets, weights, ignore_index=IGNORED, reduction="none")

    def measure_background(self, embedding: Tensor, sample: Sample) -> Tensor:
        """Return the loss of the masks predicted for an image's background points: of their scores and classes."""
        predictions = self.model(embedding, sample.background, learns_masks=False)
        targets = fit_classes(predictions.logits, sample)
        errors = self.measure_classes(predictions.class_logits, targets)
        class_error = errors.sum() / (targets != IGNORED).sum().clamp(min=1)
        return self.config.losses.iou_ratio * predictions.scores.square().mean() + class_error

    def list_measures(self, losses: ClassLosses) -> tuple[Tensor, ...]:
        return *super().list_measures(losses), losses.class_error, losses.is_right

    def measure_generator(self, records: list[Record], tuned: Tuned) -> dict[str, float]:
        figures = super().measure_generator(records, tuned)
        by_class = score_classes(records, tuned.found, self.table)
        named = {f"val_classes_{name}": by_class[name] for name in ("ap", "ap50", "ar_100") if name in by_class}
        return figures | named

    def describe_start(self, data: LabelledSet) -> list[str]:
        return [describe_categories(self.table, data.train)]

    def describe_card(self, data: LabelledSet) -> dict[str, Any]:
        return {"categories": self.table.names[1:], "category_ids": list_category_ids(self.table)}

    def number_categories(self, card: Card) -> dict[int, str]:
        return dict(zip(card.category_ids, card.categories, strict=True))

    def match_categories(self, loaded: LoadedModel, data: LabelledSet) -> ClassTable:
        table = match_categories(loaded, data)
        refuse_strangers(table, data.category_names, loaded.source)
        return table


@torch.no_grad()
def fit_classes(logits: Tensor, sample: Sample) -> Tensor:
    """Return the class of the image's object that each mask is, N x M, of those that are in sight.

    `NO_OBJECT` where it is none, and `IGNORED` where nobody can tell: between the two thresholds, for an empty mask and
    for one that lies in a crowd region. All objects of the image count, whichever the prompt is for: a click on a part
    may give the mask of the whole.

    Args:
        logits: N x M x 4g x 4g.
        sample: with its cells and the classes of the objects in them.
    """
    classes = torch.tensor([IGNORED, *sample.cell_classes], device=logits.device)  # first what is none of them
    cells = sample.cells.flatten().long() - CROWD  # crowd, padding, none, and the objects
    shared = logits.new_zeros(logits.shape[0] * logits.shape[1], 2 + len(classes))
    shared.index_add_(1, cells, (logits > 0).to(logits.dtype).flatten(0, 1).flatten(1))
    areas = shared.sum(dim=1, keepdim=True) - shared[:, 1:2]  # what lies in the padding is cut off
    sizes = torch.bincount(cells, minlength=shared.shape[1])[2:].to(logits.dtype)
    ious = shared[:, 2:] / (areas + sizes - shared[:, 2:]).clamp(min=1)
    ious[:, 0] = 0
    best_iou, best = ious.max(dim=1)
    is_unknown = (best_iou >= NO_OBJECT_IOU) | (shared[:, 0] >= CROWD_SHARE * areas[:, 0]) | (areas[:, 0] == 0)
    targets = torch.where(is_unknown, IGNORED, NO_OBJECT)
    return torch.where(best_iou >= OBJECT_IOU, classes[best], targets).view(logits.shape[:2])


def _mean_best_and_others(errors: Tensor, targets: Tensor, best: Tensor) -> Tensor:
    """Return of each object the mean of its best mask's error and of that of its others, N, where they are taught any.

    An object's own category counts as much as whatever its other masks are.
    """
    is_best = F.one_hot(best, errors.shape[1]).bool()
    own = errors[is_best]
    counts = ((targets != IGNORED) & ~is_best).sum(dim=1)
    others = errors.masked_fill(is_best, 0).sum(dim=1) / counts.clamp(min=1)
    return torch.where(counts > 0, (own + others) / 2, own)


def weigh_classes(records: Sequence[Record], table: ClassTable) -> Tensor:
    """Return what each class weighs in the cross-entropy, 1 + K: rare categories more, their objects' mean being 1.

    They are those of the whole training set, so that neither the batch nor the number of processes enters.
    """
    found = Counter(table.by_category[one.category_id] for record in records for one in record.annotations)
    counts = torch.tensor([found[number] for number in range(len(table.names))], dtype=torch.float64)
    weights = counts.clamp(min=1) ** -BALANCE
    weights = weights * counts.sum() / (weights * counts).sum()
    weights[NO_OBJECT] = 1.0
    return weights.float()


def describe_categories(table: ClassTable, records: Sequence[Record]) -> str:
    """Return one line: the categories and how many objects of each are trained on, and what is to be known of them."""
    found = Counter(table.by_category[one.category_id] for record in records for one in record.annotations)
    parts = [f"{printable(name)} ({found[number]})" for number, name in enumerate(table.names[1:], start=1)]
    line = f"categories and their objects: {', '.join(parts)}"
    if len(parts) == 1:
        line += "; there is only one, so what is learnt is whether a mask is an object"
    missing = [name for number, name in enumerate(table.names) if number and not found[number]]
    if missing:
        line += f"; without an object, never learnt: {', '.join(map(printable, missing))}"
    return line
