"""`--mode evaluate` for weights with a semantic head."""

import csv
import io
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from finestsam.config import Config
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.loaders import build_validation_loader
from finestsam.data.read import LabelledSet, refuse_unread
from finestsam.data.semantic import ClassTable, match_classes
from finestsam.evaluation.class_scores import refuse_strangers
from finestsam.evaluation.own_run import OwnRun
from finestsam.evaluation.prompt_scores import print_skipped
from finestsam.evaluation.semantic_scores import count_images, describe_classes, summarize_pixels
from finestsam.model.load import LoadedModel
from finestsam.prediction.embedder import Embedder, fill_store, open_store
from finestsam.runtime.whole_files import write_json, write_text

MEASURES = ("miou", "mdice", "pixel_accuracy")


def evaluate_classes(config: Config, loaded: LoadedModel, data: LabelledSet, run: OwnRun | None, folder: Path) -> int:
    """Measure the classes of pixels, and write `evaluation.json` and `per_image.csv`.

    Args:
        data: with the images in `val`.
        run: that the weights come from; None: it is not known.
        folder: for the results.
    """
    table = find_classes(loaded, data)
    embedder = Embedder(loaded.model, open_store(config.store, loaded.model))
    settings = SampleSettings(loaded.model.image_size, 1, 0, config.prompts, config.dataset, classes=table)
    dataset = SampleDataset(data.val, settings, store=embedder.store)
    if embedder.store:
        fill_store(embedder, [dataset], config.num_workers)
    loader = build_validation_loader(dataset, config.num_workers)
    batches = tqdm(loader, desc="classes", disable=not sys.stderr.isatty(), leave=False)
    learned = run.list_learned(data.val) if run else []
    total, rows = np.zeros((len(table.names),) * 2, dtype=np.int64), []
    for sample, counts in count_images(embedder, print_skipped(batches), data.val, table):
        total += counts
        found = summarize_pixels(counts, table.names)
        is_learned = str(sample.file_name in learned).lower()
        rows.append([sample.file_name, *(found.get(name) for name in MEASURES), is_learned])
    refuse_unread(config.dataset, len(rows))
    figures = summarize_pixels(total, table.names)
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


def find_classes(loaded: LoadedModel, data: LabelledSet) -> ClassTable:
    """Return which of the model's classes the dataset's categories are, by name, and say which are none.

    Raises:
        UserError: not one is.
    """
    card = loaded.card
    table = match_classes(data.category_names, card.classes, card.ignores_unlabelled)
    refuse_strangers(table, data.category_names, loaded.source)
    return table
