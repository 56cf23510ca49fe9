"""Validation during training: what `--mode evaluate` measures, on the validation images, shared by the ranks."""

import math
import time
from dataclasses import replace

import numpy as np

from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig
from finestsam.evaluation.candidates import find_candidates
from finestsam.evaluation.class_scores import score_classes
from finestsam.evaluation.generator_scores import Tuned, choose_grids, list_fixed, open_for_tuning, tune
from finestsam.evaluation.prompt_scorer import PromptScorer, average_clicks
from finestsam.evaluation.prompt_scores import print_skipped, score_batches, summarize_scores
from finestsam.evaluation.semantic_scores import count_images
from finestsam.prediction.generator import resolve_generator
from finestsam.runtime.memory import reporting_out_of_memory
from finestsam.training.log import GENERATOR_FIGURES, show_progress
from finestsam.training.run import Run
from finestsam.training.semantic import summarize_validation


def validate(run: Run) -> None:
    """Measure prompted masks and the generator, or classes, on the validation images, shared by the ranks.

    Into `progress.metrics`, and the generator's settings that did best into `progress.generator`.

    Raises:
        Interrupted: a signal came to any rank.
    """
    progress = run.progress
    progress.metrics, progress.generator, progress.tuned_on, progress.validation_seconds = {}, {}, 0, 0.0
    if run.val_loader is None:
        return
    started = time.perf_counter()
    run.loaded.model.eval()
    if run.is_semantic:
        run.progress.metrics |= _validate_classes(run)
    else:
        run.progress.metrics |= _validate_prompts(run)
        if run.config.evaluate.all_prompts:
            run.progress.metrics |= _validate_boxes_and_clicks(run)
        if run.config.evaluate.generator:
            run.progress.metrics |= _validate_generator(run)
    # What is no number is nothing to be judged by, and nothing that json could say.
    run.progress.metrics = {name: value for name, value in run.progress.metrics.items() if math.isfinite(value)}
    run.loaded.model.train()
    run.progress.validation_seconds = time.perf_counter() - started


def _validate_classes(run: Run) -> dict[str, float]:
    batches = show_progress(run.val_loader, "validation", len(run.val_loader), run.is_first_rank)

    def count() -> np.ndarray:
        found = count_images(run.stepper.embedder, print_skipped(batches), run.data.val, run.classes)
        return sum((counts for _, counts in found), np.zeros((len(run.classes.names),) * 2, dtype=np.int64))

    return summarize_validation(sum(run.ranks.gather(count)), run.classes.names)


def _validate_prompts(run: Run) -> dict[str, float]:
    batches = show_progress(run.val_loader, "validation", len(run.val_loader), run.is_first_rank)
    chunk = run.stepper.chunk_objects

    def score() -> list:
        with reporting_out_of_memory("validation", f"--chunk_objects below {chunk}, or a smaller --model.type"):
            return score_batches(run.stepper.embedder, batches, chunk)

    shares = run.ranks.gather(score)
    scores = summarize_scores([score for share in shares for score in share])
    names = {"per_mask_iou": "iou", "per_mask_dice": "dice", "best_iou": "best_iou", "boundary_iou": "boundary_iou"}
    return {f"val_{column}": scores[name] for column, name in names.items() if name in scores}


def _validate_boxes_and_clicks(run: Run) -> dict[str, float]:
    """Ask for every object with a box, and correct the model on it click by click."""
    chunk, title = run.stepper.chunk_objects, "validation" if run.is_first_rank else None
    records = [record for record in run.data.val if record.annotations][run.ranks.rank :: run.ranks.count]
    scorer = PromptScorer(replace(run.config, chunk_objects=chunk), run.stepper.embedder, records, title)

    def measure() -> tuple[list, list]:
        with reporting_out_of_memory("validation", f"--chunk_objects below {chunk}, or --evaluate.all_prompts false"):
            return scorer.score_prompts(["box"])["box"], scorer.measure_clicks()

    shares = run.ranks.gather(measure)
    boxes = summarize_scores([score for share, _ in shares for score in share])
    clicks = average_clicks([row for _, share in shares for row in share])
    figures = {f"val_box_{name}": boxes[name] for name in ("iou", "dice", "boundary_iou") if name in boxes}
    return figures | {f"val_clicks_iou_{count}": iou for count, iou in clicks.items()}


def _validate_generator(run: Run) -> dict[str, float]:
    """Run the real generator without its thresholds, choose them, and measure what it gives with them."""
    ranks, config = run.ranks, run.config
    records = run.data.val[: config.evaluate.max_images or None]
    start, fixed = resolve_generator(config.generator, card=None), list_fixed(config.generator)
    if config.evaluate.search is not False:
        start = open_for_tuning(start, fixed)

    def find() -> list:
        advice = f"--generator.points_per_batch below {start.points_per_batch}, or --evaluate.generator false"
        with reporting_out_of_memory("validation, generator", advice):
            return find_candidates(
                run.stepper.embedder,
                records[ranks.rank :: ranks.count],
                start,
                choose_grids(start, fixed),
                config.dataset.images,
                "validation, generator" if run.is_first_rank else None,
            )

    shares = ranks.gather(find)
    found = [shares[place % ranks.count][place // ranks.count] for place in range(len(records))]
    known = [(record, one) for record, one in zip(records, found, strict=True) if one is not None]
    if not known:
        return {}
    records, found = map(list, zip(*known, strict=True))
    if config.evaluate.search is False:
        fixed |= set(GENERATOR_DEFAULTS)
    tuned, figures = ranks.join(lambda: _tune(run, records, found, start, fixed))
    run.progress.generator = tuned.describe()
    run.progress.tuned_on = 0 if config.evaluate.search is False else len(records)
    return figures


def _tune(
    run: Run, records: list, found: list, start: GeneratorConfig, fixed: frozenset[str]
) -> tuple[Tuned, dict[str, float]]:
    """Choose the thresholds, and return with them the figures for metrics.csv."""
    tuned = tune(records, found, start, fixed, run.config.evaluate.goal)
    figures = tuned.measure(records)
    figures["masks"] = figures["masks_per_image"]
    figures["objects"] = sum(len(record.annotations) for record in records) / len(records)
    measured = {f"val_generator_{name}": figures[name] for name in GENERATOR_FIGURES if name in figures}
    if run.classes:
        by_class = score_classes(records, tuned.found, run.classes)
        measured |= {f"val_classes_{name}": by_class[name] for name in ("ap", "ap50", "ar_100") if name in by_class}
    return tuned, measured
