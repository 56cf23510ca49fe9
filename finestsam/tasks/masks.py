"""The task masks: masks of objects and their scores, as SAM's automatic mask generator uses them."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from finestsam.batch import Predictions, Sample
from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig
from finestsam.data.read import LabelledSet
from finestsam.data.semantic import ClassTable
from finestsam.evaluation.candidates import Candidates, find_candidates
from finestsam.evaluation.evaluate_masks import evaluate_masks
from finestsam.evaluation.generator_scores import Tuned, choose_grids, list_fixed, open_for_tuning, tune
from finestsam.evaluation.own_run import OwnRun
from finestsam.evaluation.prompt_scorer import PromptScorer, average_clicks
from finestsam.evaluation.prompt_scores import score_batches, summarize_scores
from finestsam.model.card import Card
from finestsam.model.load import LoadedModel
from finestsam.prediction.embedder import Embedder
from finestsam.prediction.generator import resolve_generator
from finestsam.prediction.predict_masks import predict_masks
from finestsam.records import Record
from finestsam.runtime.memory import reporting_out_of_memory
from finestsam.tasks.base import Task, Validation, ValidationSet
from finestsam.tasks.losses import ObjectLosses, object_losses

PROMPT_COLUMNS = ("val_per_mask_iou", "val_per_mask_dice", "val_best_iou", "val_boundary_iou")
GENERATOR_FIGURES = (
    "ap", "ap50", "ap75", "ar_10", "ar_100", "ar_1000", "ap_small", "ap_medium", "ap_large",
    "ar_1000_small", "ar_1000_medium", "ar_1000_large", "f1", "masks", "objects",
)  # fmt: skip
GENERATOR_COLUMNS = tuple(f"val_generator_{name}" for name in GENERATOR_FIGURES)
COUNT_COLUMN = "val_generator_masks"
# With evaluate.all_prompts.
BOX_AND_CLICK_COLUMNS = (
    "val_box_iou", "val_box_dice", "val_box_boundary_iou",
    "val_clicks_iou_1", "val_clicks_iou_2", "val_clicks_iou_3", "val_clicks_iou_5", "val_clicks_iou_8",
)  # fmt: skip


class MasksTask(Task):
    """A step prompts SAM with objects and trains its best mask of each and the scores of all."""

    name = "masks"
    measures: ClassVar[dict[str, str]] = {
        "total_loss": "Total loss",
        "focal_loss": "Focal loss",
        "dice_loss": "Dice loss",
        "iou_loss": "IoU loss",
        "iou": "IoU",
        "predicted_iou": "Predicted IoU",
    }
    validation_columns: ClassVar[tuple[str, ...]] = (*PROMPT_COLUMNS, *GENERATOR_COLUMNS)
    printed: ClassVar[dict[str, str]] = {
        "val_per_mask_iou": "point IoU {:.2f}",
        "val_generator_ap": "AP {:.3f}",
        "val_generator_f1": "F1 {:.3f}",
        "val_generator_ar_100": "AR@100 {:.3f}",
        COUNT_COLUMN: "{:.1f} masks an image",  # the last: the number of objects follows it
    }
    default_metrics: ClassVar[dict[str, str]] = {"complete": "val_generator_f1", "partial": "val_generator_ar_100"}
    metric = "val_per_mask_iou"
    prompts_objects = True

    @property
    def columns(self) -> tuple[str, ...]:
        return self.validation_columns + (BOX_AND_CLICK_COLUMNS if self.config.evaluate.all_prompts else ())

    @property
    def decodes_masks(self) -> bool:
        return True

    def compute_losses(self, predictions: Predictions, sample: Sample, first: int) -> ObjectLosses:
        return object_losses(predictions, sample, first, self.config.losses, self.model.image_size)

    def list_measures(self, losses: ObjectLosses) -> tuple[Tensor, ...]:
        weights = self.config.losses
        return (
            losses.total.detach(),
            weights.focal_ratio * losses.focal,
            weights.dice_ratio * losses.dice,
            weights.iou_ratio * losses.iou_error,
            losses.iou,
            losses.score.clamp(max=1),  # no IoU is above 1
        )

    def sum_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor | float:
        """Return the losses of masks where no object is.

        The mean of an image counts once for each of its objects. So it weighs as much beside the losses of objects
        however many objects an image has.
        """
        total = 0.0
        for number, sample in enumerate(samples):
            if len(sample.background):
                embedding = embeddings[number : number + 1]
                total = total + self.measure_background(embedding, sample) * sample.object_count
        return total

    def measure_background(self, embedding: Tensor, sample: Sample) -> Tensor:
        """Return the loss of the masks predicted for an image's background points: their squared scores."""
        return self.config.losses.iou_ratio * self.model.score(embedding, sample.background).square().mean()

    def validate(self, given: ValidationSet) -> Validation:
        metrics = self._validate_prompts(given)
        if self.config.evaluate.all_prompts:
            metrics |= self._validate_boxes_and_clicks(given)
        if not self.config.evaluate.generator:
            return Validation(metrics)
        found = self._validate_generator(given)
        return replace(found, metrics=metrics | found.metrics)

    def _validate_prompts(self, given: ValidationSet) -> dict[str, float]:
        """Prompt with every object as training does."""
        chunk = given.chunk_objects

        def score() -> list:
            with reporting_out_of_memory("validation", f"--chunk_objects below {chunk}, or a smaller --model.type"):
                return score_batches(given.embedder, given.batches, chunk)

        shares = given.ranks.gather(score)
        scores = summarize_scores([score for share in shares for score in share])
        names = {"per_mask_iou": "iou", "per_mask_dice": "dice", "best_iou": "best_iou", "boundary_iou": "boundary_iou"}
        return {f"val_{column}": scores[name] for column, name in names.items() if name in scores}

    def _validate_boxes_and_clicks(self, given: ValidationSet) -> dict[str, float]:
        """Prompt with the box of every object, and correct the model on it click by click."""
        chunk, ranks = given.chunk_objects, given.ranks
        records = [record for record in given.records if record.annotations][ranks.rank :: ranks.count]
        title = "validation" if ranks.rank == 0 else None
        scorer = PromptScorer(replace(self.config, chunk_objects=chunk), given.embedder, records, title)

        def measure() -> tuple[list, list]:
            with reporting_out_of_memory(
                "validation", f"--chunk_objects below {chunk}, or --evaluate.all_prompts false"
            ):
                return scorer.score_prompts(["box"])["box"], scorer.measure_clicks()

        shares = ranks.gather(measure)
        boxes = summarize_scores([score for share, _ in shares for score in share])
        clicks = average_clicks([row for _, share in shares for row in share])
        figures = {f"val_box_{name}": boxes[name] for name in ("iou", "dice", "boundary_iou") if name in boxes}
        return figures | {f"val_clicks_iou_{count}": iou for count, iou in clicks.items()}

    def _validate_generator(self, given: ValidationSet) -> Validation:
        """Run the real generator without its thresholds, choose them, and measure what it finds with them."""
        settings = self.config.evaluate
        start, fixed = resolve_generator(self.config.generator, card=None), list_fixed(self.config.generator)
        if settings.search is not False:
            start = open_for_tuning(start, fixed)
        records, found = self._find_candidates(given, start, fixed)
        if not records:
            return Validation()
        if settings.search is False:
            fixed |= set(GENERATOR_DEFAULTS)
        tuned, figures = given.ranks.join(lambda: self._tune(records, found, start, fixed))
        return Validation(figures, tuned.describe(), 0 if settings.search is False else len(records))

    def _find_candidates(
        self, given: ValidationSet, start: GeneratorConfig, fixed: frozenset[str]
    ) -> tuple[list[Record], list[Candidates]]:
        """Return the images that can be read, and what the generator could find in each, on every rank."""
        ranks, records = given.ranks, given.records[: self.config.evaluate.max_images or None]
        advice = f"--generator.points_per_batch below {start.points_per_batch}, or --evaluate.generator false"
        title = "validation, generator" if ranks.rank == 0 else None

        def find() -> list:
            with reporting_out_of_memory("validation, generator", advice):
                return find_candidates(
                    given.embedder,
                    records[ranks.rank :: ranks.count],
                    start,
                    choose_grids(start, fixed),
                    self.config.dataset.images,
                    title,
                )

        shares = ranks.gather(find)
        found = [shares[number % ranks.count][number // ranks.count] for number in range(len(records))]
        known = [(record, one) for record, one in zip(records, found, strict=True) if one is not None]
        return [record for record, _ in known], [one for _, one in known]

    def _tune(
        self, records: list[Record], found: list[Candidates], start: GeneratorConfig, fixed: frozenset[str]
    ) -> tuple[Tuned, dict[str, float]]:
        """Choose the thresholds, and return with them the figures for metrics.csv."""
        tuned = tune(records, found, start, fixed, self.config.evaluate.goal)
        return tuned, self.measure_generator(records, tuned)

    def measure_generator(self, records: list[Record], tuned: Tuned) -> dict[str, float]:
        """Return the figures of what the generator finds with the thresholds that were chosen."""
        figures = tuned.measure(records)
        figures["masks"] = figures["masks_per_image"]
        figures["objects"] = sum(len(record.annotations) for record in records) / len(records)
        return {f"val_generator_{name}": figures[name] for name in GENERATOR_FIGURES if name in figures}

    def predict(self, loaded: LoadedModel, paths: list[Path], out_dir: Path, embedder: Embedder) -> int:
        """Write an overlay of each image and one COCO json of all."""
        return predict_masks(paths, out_dir, embedder, loaded.card, self.number_categories(loaded.card), self.config)

    def number_categories(self, card: Card | None) -> dict[int, str]:
        """Return the names by id of the categories in predictions.json, in the order of the model's classes."""
        return {1: card.categories[0] if card and len(card.categories) == 1 else "object"}

    def evaluate(self, loaded: LoadedModel, data: LabelledSet, run: OwnRun | None, folder: Path) -> int:
        return evaluate_masks(self.config, loaded, data, run, folder, self.match_categories(loaded, data))

    def match_categories(self, loaded: LoadedModel, data: LabelledSet) -> ClassTable | None:
        """Return which of the classes that the model gives masks the dataset's categories are; None: it gives none."""
        return None
