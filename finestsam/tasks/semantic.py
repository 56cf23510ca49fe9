"""The task semantic: a class for each pixel, from a head on the image's embedding."""

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from finestsam.batch import Batch, Sample
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.loaders import build_validation_loader
from finestsam.data.read import LabelledSet, refuse_unread
from finestsam.data.semantic import (
    BACKGROUND_NAME,
    IGNORED,
    ClassTable,
    match_classes,
    number_classes,
    render_label_cells,
    render_label_map,
)
from finestsam.errors import UserError, printable
from finestsam.evaluation.class_scores import refuse_strangers
from finestsam.evaluation.own_run import OwnRun
from finestsam.evaluation.prompt_scores import print_skipped
from finestsam.evaluation.semantic_scores import count_pixels, describe_classes, summarize_pixels
from finestsam.images.files import write_image
from finestsam.images.frames import compute_input_size
from finestsam.model.heads import SemanticHead, load_semantic_head
from finestsam.model.load import LoadedModel
from finestsam.model.resample import build_axis
from finestsam.model.sam import FinestSam
from finestsam.prediction.each_image import predict_each
from finestsam.prediction.embedder import Embedder, fill_store, open_embedder
from finestsam.prediction.files import LABELS_SUFFIX, OVERLAY_SUFFIX, name_outputs
from finestsam.prediction.overlay import colour_classes, render_classes
from finestsam.records import Record
from finestsam.runtime.folders import refuse_foreign
from finestsam.runtime.whole_files import write_json, write_text
from finestsam.tasks.base import Task, Validation, ValidationSet
from finestsam.tasks.losses import DICE_SMOOTH

LEGEND_NAME = "classes.json"
MEASURES = ("miou", "mdice", "pixel_accuracy")


class SemanticTask(Task):
    """A step trains the class of every pixel; the mask decoder stays as it is."""

    name = "semantic"
    measures: ClassVar[dict[str, str]] = {
        "total_loss": "Total loss",
        "cross_entropy_loss": "Cross-entropy",
        "dice_loss": "Dice loss",
        "pixel_accuracy": "Pixel accuracy",
    }
    columns: ClassVar[tuple[str, ...]] = tuple(f"val_{name}" for name in MEASURES)
    printed: ClassVar[dict[str, str]] = {"val_miou": "mIoU {:.3f}"}
    metric = "val_miou"
    no_thresholds = "they are for classes of pixels, which no threshold decides about"

    def begin_training(self, loaded: LoadedModel, data: LabelledSet, names: Sequence[str] | None) -> None:
        """Take the head that the weights have, where it is for the same classes; else a new one."""
        ignores = self.config.dataset.labels == "partial"
        table, card, model = number_classes(data.category_names, ignores), loaded.card, self.model
        if names is not None:
            table = match_classes(data.category_names, [BACKGROUND_NAME, *names], ignores)
        if card and card.task == self.name and set(table.names) == set(card.classes):
            table = match_classes(data.category_names, card.classes, ignores)
            head = load_semantic_head(loaded.path, card.classes, model.sam.prompt_encoder.embed_dim)
        else:
            head = SemanticHead(model.sam.prompt_encoder.embed_dim, len(table.names))
        model.semantic_head = head.to(model.device)
        self.table = table

    def choose_targets(self, settings: SampleSettings) -> SampleSettings:
        label_cells = partial(render_label_cells, table=self.table)
        return replace(settings, label_cells=label_cells, prompts_objects=False)

    def choose_validation_targets(self, settings: SampleSettings) -> SampleSettings:
        return self.choose_targets(settings)

    def compute_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor:
        labels = torch.stack([sample.cells for sample in samples])
        return measure_classes(self.model(embeddings, None), labels)

    def validate(self, given: ValidationSet) -> Validation:
        names = self.table.names

        def count() -> np.ndarray:
            found = count_images(given.embedder, print_skipped(given.batches), given.records, self.table)
            return sum((counts for _, counts in found), np.zeros((len(names),) * 2, dtype=np.int64))

        figures = summarize_pixels(sum(given.ranks.gather(count)), names)
        return Validation({f"val_{name}": figures[name] for name in MEASURES if name in figures})

    def describe_start(self, data: LabelledSet) -> list[str]:
        return [f"classes: {', '.join(self.table.names)}"]

    def describe_card(self, data: LabelledSet) -> dict[str, Any]:
        table = self.table
        ignores = table.ignores_unlabelled
        return {"categories": data.categories, "classes": table.names, "ignores_unlabelled": ignores}

    def predict(self, loaded: LoadedModel, paths: list[Path], out_dir: Path, embedder: Embedder) -> int:
        """Write an overlay and a label map of each image, and the legend of both."""
        config, names = self.config, loaded.card.classes
        refuse_foreign(out_dir, [LEGEND_NAME])
        outputs = name_outputs(paths, out_dir, (OVERLAY_SUFFIX, LABELS_SUFFIX))
        if config.resume:
            raise UserError("--resume: weights with classes for pixels predict every image anew; leave it out")
        found = predict_each(paths, outputs, embedder, config.dataset.images, self._predict_one)
        write_legend(out_dir / LEGEND_NAME, names)
        legend = out_dir / LEGEND_NAME
        print(f"overlays and label maps (*{LABELS_SUFFIX}): {printable(out_dir)}, their classes: {legend}")
        shares = describe_shares(names, sum(found.results))
        print(f"{len(found.results)} images, {found.seconds:.2f} s an image; {shares}")
        return 2 if config.strict and len(found.results) < len(paths) else 0

    def _predict_one(self, pixels: np.ndarray, embedding: Tensor, outputs: tuple[Path, ...]) -> np.ndarray:
        """Write overlay and label map of an image, and return the pixels of each class."""
        size = pixels.shape[:2]
        classes = classify(self.model, embedding, compute_input_size(size, self.model.image_size), size)
        overlay, labels = outputs
        write_image(overlay, render_classes(pixels, classes, self.config.opacity))
        write_image(labels, classes)
        return np.bincount(classes.ravel(), minlength=self.model.semantic_head.classify.out_channels)

    def evaluate(self, loaded: LoadedModel, data: LabelledSet, run: OwnRun | None, folder: Path) -> int:
        """Measure the classes of pixels, and write `evaluation.json` and `per_image.csv`."""
        self.table = find_classes(loaded, data)
        names = self.table.names
        learned = run.list_learned(data.val) if run else []
        total, rows = np.zeros((len(names),) * 2, dtype=np.int64), []
        for sample, counts in self._count_stored(data):
            total += counts
            found = summarize_pixels(counts, names)
            is_learned = str(sample.file_name in learned).lower()
            rows.append([sample.file_name, *(found.get(name) for name in MEASURES), is_learned])
        refuse_unread(self.config.dataset, len(rows))
        figures = summarize_pixels(total, names)
        for name in MEASURES:
            if name in figures:
                print(f"{name:<20}{figures[name]:.4f}")
        print("\n".join(describe_classes(figures)))
        write_json(folder / "evaluation.json", figures, indent=2)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["file_name", *MEASURES, "trained_on"], *rows])
        write_text(folder / "per_image.csv", text.getvalue())
        print(f"figures: {folder / 'evaluation.json'}, image by image: {folder / 'per_image.csv'}")
        return 0

    def _count_stored(self, data: LabelledSet) -> Iterator[tuple[Sample, np.ndarray]]:
        """Yield what `count_images` counts of the images in `data.val`, whose embeddings the store keeps."""
        config, embedder = self.config, open_embedder(self.config.store, self.model)
        settings = SampleSettings(self.model.image_size, 1, 0, config.prompts, config.dataset)
        dataset = SampleDataset(data.val, self.choose_targets(settings), store=embedder.store)
        if embedder.store:
            fill_store(embedder, [dataset], config.num_workers)
        loader = build_validation_loader(dataset, config.num_workers)
        batches = tqdm(loader, desc="classes", disable=not sys.stderr.isatty(), leave=False)
        return count_images(embedder, print_skipped(batches), data.val, self.table)


def measure_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each image the loss, its parts cross-entropy and Dice, and the pixel accuracy, B x 4.

    Args:
        logits: B x K x H x W.
        labels: B x H x W, classes; cells that are `IGNORED` do not count.
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


@torch.no_grad()
def classify(
    model: FinestSam, embedding: torch.Tensor, input_size: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Return the class of each pixel of an image, H x W, uint8, or uint16 where there are more than 256.

    Logits are brought to the image's size a band of rows at a time: all of them would be K times the image in float32.

    Args:
        embedding: 1 x C x g x g.
        input_size: of the image in the input frame, as `size` is in its own.
    """
    logits = model(embedding, None)[0]
    rows, columns = (
        build_axis(logits.shape[-1], model.image_size, length, own)
        for length, own in zip(input_size, size, strict=True)
    )
    dtype = np.uint8 if len(logits) <= 256 else np.uint16
    classes = np.empty(size, dtype=dtype)
    matrix = rows.matrix.to(logits)
    for pixels, used in rows.blocks:
        wide = columns.spread(logits[:, used].transpose(1, 2)).transpose(1, 2)
        classes[pixels] = (matrix[pixels, used] @ wide).argmax(dim=0).cpu().numpy().astype(dtype)
    return classes


def count_images(
    embedder: Embedder, batches: Iterable[tuple[Batch, list[str]]], records: Sequence[Record], table: ClassTable
) -> Iterator[tuple[Sample, np.ndarray]]:
    """Classify images, and yield each with its `count_pixels`.

    Args:
        batches: as `data.dataset.collate` makes them.
        records: of the images.
    """
    by_id = {record.image_id: record for record in records}
    for batch, _ in batches:
        for sample in batch.to(embedder.model.device).samples:
            embedding = embedder.embed([sample])
            predicted = classify(embedder.model, embedding, sample.input_size, sample.original_size)
            yield sample, count_pixels(render_label_map(by_id[sample.image_id], table), predicted, len(table.names))


def find_classes(loaded: LoadedModel, data: LabelledSet) -> ClassTable:
    """Return which of the model's classes the dataset's categories are, by name, and say which are none.

    Raises:
        UserError: not one is.
    """
    card = loaded.card
    table = match_classes(data.category_names, card.classes, card.ignores_unlabelled)
    refuse_strangers(table, data.category_names, loaded.source)
    return table


def write_legend(path: Path, names: list[str]) -> None:
    """Write the class that each number of a label map stands for, and its colour in the overlays."""
    colours = colour_classes(len(names)).tolist()
    legend = [
        {"id": number, "name": name, "color": "#{:02x}{:02x}{:02x}".format(*colour) if number else None}
        for number, (name, colour) in enumerate(zip(names, colours, strict=True))
    ]
    try:
        write_json(path, legend, indent=1)
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be written: {error.strerror or error}") from None


def describe_shares(names: list[str], counts: np.ndarray) -> str:
    """Return the classes that were found and their share of all pixels, the largest first, five at most."""
    order = [number for number in np.argsort(-counts, kind="stable")[:5] if counts[number]]
    return ", ".join(f"{names[number]} {100 * counts[number] / counts.sum():.1f} %" for number in order)
