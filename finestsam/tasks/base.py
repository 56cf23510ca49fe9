"""The seam of the tasks: everything that depends on what is learned.

A task is one file: a subclass of `Task`, named in `tasks.TASKS` and in the choices of the setting `task`. Training
loop, step, checkpoint, ranks and report use the methods here and know no task by its name.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from finestsam.batch import Batch, Predictions, Sample
from finestsam.config import Config
from finestsam.data.dataset import SampleSettings
from finestsam.data.read import LabelledSet
from finestsam.data.semantic import ClassTable
from finestsam.evaluation.own_run import OwnRun
from finestsam.model.load import LoadedModel
from finestsam.model.sam import FinestSam
from finestsam.prediction.embedder import Embedder
from finestsam.records import Record
from finestsam.tasks.losses import ObjectLosses

Result = TypeVar("Result")


class Ranks(Protocol):
    """The processes that share a validation. All of them call `gather` and `join` in the same order."""

    rank: int
    count: int

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """Do the work on every rank, and return all results on each."""

    def join(self, work: Callable[[], Result]) -> Result:
        """Do the work on every rank, and return this rank's result when all are done."""


@dataclass(frozen=True)
class ValidationSet:
    """The validation images and what measures them.

    Args:
        records: all images, the same on every rank.
        batches: this rank's share of the images that have something to learn, as `data.dataset.collate` makes them.
        chunk_objects: objects decoded at a time.
    """

    records: list[Record]
    batches: Iterable[tuple[Batch, list[str]]]
    embedder: Embedder
    chunk_objects: int
    ranks: Ranks


@dataclass(frozen=True)
class Validation:
    """What a validation has measured.

    Args:
        metrics: by the names of the columns of metrics.csv.
        generator: the generator's settings that did best, as they go into best.json; empty where none were chosen.
        tuned_on: images that they were chosen on.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    generator: dict[str, Any] = field(default_factory=dict)
    tuned_on: int = 0
    seconds: float = 0.0


class Task:
    """What is learned from a dataset, predicted for an image and measured.

    Attributes:
        measures: titles of what a training step measures, by column of metrics.csv. The first is the loss. The other
            losses carry their weights, so that they add up to it.
        printed: how the screen shows what validation measures, by column.
        default_metrics: what best weights are chosen by where the settings leave it open, by dataset.labels.
        metric: what best weights are chosen by where that is not measured, and between equals.
        prompts_objects: whether prediction prompts SAM with points, so that training should as well.
        no_thresholds: why no thresholds can be stored beside the weights; empty: they can.
        table: the classes that the model distinguishes; None: it distinguishes none.
    """

    name: ClassVar[str]
    measures: ClassVar[dict[str, str]]
    printed: ClassVar[dict[str, str]]
    default_metrics: ClassVar[dict[str, str]] = {}
    metric: ClassVar[str]
    prompts_objects: ClassVar[bool] = False
    no_thresholds: ClassVar[str] = ""

    def __init__(self, config: Config, model: FinestSam):
        self.config = config
        self.model = model
        self.table: ClassTable | None = None

    # Training.

    @property
    def columns(self) -> tuple[str, ...]:
        """What validation measures, in the order of metrics.csv."""
        raise NotImplementedError

    @property
    def decodes_masks(self) -> bool:
        """Whether a step prompts with objects and decodes masks. Otherwise its losses are those of embeddings."""
        return False

    def begin_training(self, loaded: LoadedModel, data: LabelledSet, names: Sequence[str] | None) -> None:
        """Choose what is learned from a dataset, and give the model a head for it where the task needs one.

        Args:
            names: of the classes in a run that is continued, as its checkpoint keeps `class_names`; None: it begins.
        """

    @property
    def class_names(self) -> list[str] | None:
        """The names of classes 1, 2, ..., in the order of the head; None where there are none."""
        return self.table.names[1:] if self.table else None

    def choose_targets(self, settings: SampleSettings) -> SampleSettings:
        """Return the settings with what a training sample carries beside image and prompts."""
        return settings

    def choose_validation_targets(self, settings: SampleSettings) -> SampleSettings:
        """Return the settings with what a validation sample carries."""
        return settings

    def compute_losses(self, predictions: Predictions, sample: Sample, first: int) -> ObjectLosses:
        """Return the losses of the masks predicted for the objects `first`, `first` + 1, ... of a sample."""
        raise NotImplementedError

    def list_measures(self, losses: ObjectLosses) -> tuple[Tensor, ...]:
        """Return what `measures` names, each N, without a gradient."""
        raise NotImplementedError

    def sum_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor | float:
        """Return what is added to the losses of objects: a loss for each image, times the number of its objects.

        Args:
            embeddings: B x C x g x g.
        """
        return 0.0

    def compute_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor:
        """Return what `measures` names for each image, B x M; the first, the loss, has a gradient.

        Called in place of `compute_losses` where no masks are decoded.

        Args:
            embeddings: B x C x g x g.
        """
        raise NotImplementedError

    def validate(self, given: ValidationSet) -> Validation:
        """Measure the validation images. The model is in evaluation mode."""
        raise NotImplementedError

    def describe_start(self, data: LabelledSet) -> list[str]:
        """Return the lines that say what is learned."""
        return []

    def describe_card(self, data: LabelledSet) -> dict[str, Any]:
        """Return the fields of best.json that depend on the task."""
        return {"categories": data.categories}

    # Prediction and evaluation of finished weights.

    def predict(self, loaded: LoadedModel, paths: list[Path], out_dir: Path, embedder: Embedder) -> int:
        """Predict images, write the results, and return the exit code."""
        raise NotImplementedError

    def evaluate(self, loaded: LoadedModel, data: LabelledSet, run: OwnRun | None, folder: Path) -> int:
        """Measure the images in `data.val`, write the figures, and return the exit code.

        Args:
            run: that the weights come from; None: it is not known.
        """
        raise NotImplementedError
