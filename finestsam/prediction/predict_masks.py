"""Predict masks for images: an overlay of each and one COCO json of all, and go on where an earlier call stopped."""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from finestsam.config import Config
from finestsam.errors import Defect, UserError, name_count, printable
from finestsam.images.files import hash_image, read_hashed_image, write_image
from finestsam.model.card import Card
from finestsam.model.embeddings import image_key
from finestsam.prediction.embedder import Embedder, hash_weights
from finestsam.prediction.files import name_overlays
from finestsam.prediction.generator import generate_masks, resolve_generator
from finestsam.prediction.journal import Journal, read_finished
from finestsam.prediction.overlay import render_named_overlay, render_overlay
from finestsam.prediction.results import GeneratedMasks, Results
from finestsam.runtime.folders import refuse_foreign
from finestsam.runtime.memory import reporting_out_of_memory

RESULTS_NAME = "predictions.json"


def predict_masks(
    paths: list[Path], out_dir: Path, embedder: Embedder, card: Card | None, categories: dict[int, str], config: Config
) -> int:
    """Find the objects of images, and return the exit code: 2 where `strict` is set and an image fails, else 0.

    Args:
        card: of the weights.
        categories: names by id, as of `Results`.

    Raises:
        UserError: no image can be predicted, or the results cannot be written.
    """
    settings = resolve_generator(config.generator, card)
    _warn_of_thresholds(config, card)
    score_map, deep_range = _find_score_map(config, card), config.dataset.images.deep_range
    results = Results(categories, settings, score_map, hash_weights(embedder), config.polygons, deep_range)
    journal = Journal(out_dir, results.origin)
    jobs = _list_jobs(paths, name_overlays(paths, out_dir))
    left = _take_up(jobs, results, journal, out_dir, config) if config.resume else jobs
    refuse_foreign(out_dir, [RESULTS_NAME])
    with _writing(journal.path):
        journal.begin(list(results.entries.values()))
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {name_count(len(jobs), 'image')} are done already")
    start = time.perf_counter()
    predicted = _predict_all(left, embedder, config, results, journal) if left else 0
    seconds = (time.perf_counter() - start) / max(predicted, 1)
    overlays = [job.overlay for job in jobs if job.name in results.entries]
    if not overlays:
        journal.remove()
        raise UserError(f"none of the {len(paths)} images can be predicted")
    with _writing(out_dir / RESULTS_NAME):
        results.write(out_dir / RESULTS_NAME, [job.name for job in jobs])
    journal.remove()
    _print_end(overlays, out_dir, results.mask_count, seconds)
    return 2 if config.strict and len(overlays) < len(jobs) else 0


def _print_end(overlays: list[Path], out_dir: Path, mask_count: int, seconds: float) -> None:
    shown = overlays[0] if len(overlays) == 1 else f"{out_dir}{os.sep} ({len(overlays)} overlays)"
    print(f"images: {printable(shown)}")
    print(f"COCO json: {printable(out_dir / RESULTS_NAME)}")
    print(f"{name_count(mask_count, 'mask')} in {name_count(len(overlays), 'image')}, {seconds:.2f} s an image")


@dataclass
class _Job:
    """An image to predict."""

    path: Path
    name: str  # in the results
    overlay: Path


def _list_jobs(paths: list[Path], overlays: list[Path]) -> list[_Job]:
    is_one_folder = len({path.parent for path in paths}) == 1
    names = [path.name if is_one_folder else path.as_posix() for path in paths]
    return [_Job(*job) for job in zip(paths, names, overlays, strict=True)]


def _take_up(jobs: list[_Job], results: Results, journal: Journal, out_dir: Path, config: Config) -> list[_Job]:
    """Add the entries of an earlier run to `results`, and return the jobs that are left."""
    # The journal comes first: it has the entries of a finished file as well, which may no longer match the overlays.
    entries = journal.read()
    if entries is None:
        entries = read_finished(out_dir / RESULTS_NAME, results.origin)
    done = {entry["image"]["file_name"]: entry for entry in entries}
    left = []
    for job in jobs:
        entry = done.get(job.name)
        if entry and _is_done(job, entry["image"], config):
            results.entries[job.name] = entry
        else:
            left.append(job)
    return left


def _is_done(job: _Job, image: dict, config: Config) -> bool:
    """Return whether an earlier run has predicted this image and rendered the wanted overlay."""
    try:
        made = _describe_made(job, hash_image(job.path, config.dataset.images), config)
    except Defect:
        return False  # broken since
    return job.overlay.is_file() and made.items() <= image.items()


def _describe_made(job: _Job, digest: str, config: Config) -> dict:
    """Return what an image's entry stores so that a later run can skip it."""
    return {"digest": digest, "overlay": job.overlay.name, "opacity": config.opacity}


@dataclass
class _Image:
    """What an image's file holds."""

    pixels: np.ndarray  # H x W x 3, uint8, RGB
    digest: str

    @property
    def key(self) -> str:
        """Return the name of its embedding in the store."""
        return image_key(self.digest, self.pixels.shape[:2])


def _predict_all(jobs: list[_Job], embedder: Embedder, config: Config, results: Results, journal: Journal) -> int:
    """Predict the images one by one into `results`, skip unreadable ones, and return how many were predicted.

    The next image is read, and the last overlay rendered and written, while the model works on this one.
    """
    done = 0
    with ThreadPoolExecutor(max_workers=1) as reader, ThreadPoolExecutor(max_workers=1) as writer:
        readings = _read_ahead(reader, jobs, config)
        written: Future | None = None
        progress = tqdm(jobs, unit="image", disable=len(jobs) == 1 or None)
        for job, reading in zip(progress, readings, strict=True):
            try:
                image = reading.result()
                masks = _find_masks(embedder, image, job.path, results)
            except Defect as defect:
                if len(jobs) == 1 and not results.entries:
                    raise UserError(f"{printable(job.path)}: {defect.message}") from None
                tqdm.write(f"finestsam: skipped {printable(job.path)}: {defect.message}", file=sys.stderr)
                continue
            if written:
                written.result()
            made = _describe_made(job, image.digest, config)
            entry = results.add(job.name, image.pixels.shape[:2], masks, made)
            render = functools.partial(_render, image.pixels, masks, results, config.opacity)
            written = writer.submit(_write, job.overlay, render, journal, entry)
            done += 1
            if len(masks) == 0:
                tqdm.write(f"{printable(job.path)}: no masks: {masks.report.explain_no_masks(results.settings)}")
        if written:
            written.result()
    return done


def _read_ahead(reader: Executor, jobs: list[_Job], config: Config) -> Iterator[Future]:
    """Yield the images in order, with one more being read."""
    following = reader.submit(_read, jobs[0].path, config)
    for job in jobs[1:]:
        image, following = following, reader.submit(_read, job.path, config)
        yield image
    yield following


def _read(path: Path, config: Config) -> _Image:
    return _Image(*read_hashed_image(path, config.dataset.images))


def _find_masks(embedder: Embedder, image: _Image, path: Path, results: Results) -> GeneratedMasks:
    advice = f"--generator.points_per_batch below {results.settings.points_per_batch}, or a smaller --model.type"
    with reporting_out_of_memory(printable(path), advice):
        embedding = embedder.embed_image(image.key, image.pixels)  # from the store where it was predicted before
        return generate_masks(embedder.model, image.pixels, results.settings, embedding)


def _render(pixels: np.ndarray, masks: GeneratedMasks, results: Results, opacity: float) -> np.ndarray:
    """Return the overlay; a model with categories gives them their colours and a legend."""
    if masks.has_classes:
        return render_named_overlay(pixels, masks.rles, masks.classes, list(results.categories.values()), opacity)
    return render_overlay(pixels, masks.rles, opacity)


def _write(path: Path, render: Callable[[], np.ndarray], journal: Journal, entry: dict) -> None:
    """Write an overlay, and note in the journal that its image is finished."""
    with _writing(path):
        write_image(path, render())
        journal.add(entry)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be written: {error.strerror or error}") from None


def _warn_of_thresholds(config: Config, card: Card | None) -> None:
    """Print a hint where the generator's thresholds were not tuned for these weights."""
    is_given = None not in (config.generator.pred_iou_thresh, config.generator.stability_score_thresh)
    if is_given or (card and "pred_iou_thresh" in card.generator):
        return
    print(
        "warning: the generator's thresholds were never chosen for these weights, so segment_anything's are used, "
        "which suit Meta's vit_h; --mode evaluate --dataset FOLDER --evaluate.search true --evaluate.store_thresholds "
        "true on annotated images chooses them",
        file=sys.stderr,
    )


def _find_score_map(config: Config, card: Card | None) -> list[list[float]]:
    """Return the score map that is stored beside the weights; empty where the settings do not ask for it.

    Raises:
        UserError: a correction is wanted and there is none.
    """
    if not config.correct_scores:
        return []
    found = card.generator.get("score_map") if card else None
    if not found:
        raise UserError("correct_scores: no map is stored beside these weights; training makes one")
    return found
