"""`--mode predict`: find the objects of images; write an overlay of each image and one COCO json of all."""

import functools
import glob
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from finestsam.config import Config
from finestsam.errors import Defect, UserError, name_count, printable
from finestsam.images.files import IMAGE_SUFFIXES, hash_image, read_hashed_image, write_image
from finestsam.model.card import Card
from finestsam.model.embeddings import image_key
from finestsam.model.load import LoadedModel, load_model
from finestsam.prediction.embedder import Embedder, hash_weights, open_store
from finestsam.prediction.generator import generate_masks, resolve_generator
from finestsam.prediction.journal import Journal, read_finished
from finestsam.prediction.overlay import render_named_overlay, render_overlay
from finestsam.prediction.results import GeneratedMasks, Results
from finestsam.prediction.semantic import LABELS_SUFFIX, LEGEND_NAME, predict_classes
from finestsam.runtime.cpu import set_processor
from finestsam.runtime.folders import claim_output_folder, is_replaceable, refuse_foreign
from finestsam.runtime.memory import reporting_out_of_memory

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".flv", ".mpg", ".mpeg"}
RESULTS_NAME = "predictions.json"
# Outputs beside the images have a marked name: they overwrite no image, and the next run does not predict on them.
BESIDE_MARK = ".finestsam"
OVERLAY_SUFFIX = ".png"
MAX_STEM_BYTES = 200  # file systems allow names of 255; a number and the suffix follow


def predict(config: Config) -> int:
    """Run the mode and return the exit code: 2 where `strict` is set and an image cannot be predicted, else 0.

    Raises:
        UserError: there is nothing to predict, or nowhere to write it.
    """
    set_processor()
    paths = find_images(config.input, Path(config.out_dir))
    out_dir = claim_output_folder(Path(config.out_dir), config.dataset.path)
    loaded = load_model(config, prefer_runs=True)
    print(f"model: {loaded.model_type}, {printable(loaded.source)}")
    embedder = Embedder(loaded.model, open_store(config.store, loaded.model))
    if loaded.model.semantic_head is not None:
        refuse_foreign(out_dir, [LEGEND_NAME])
        outputs = name_outputs(paths, out_dir, (OVERLAY_SUFFIX, LABELS_SUFFIX))
        return predict_classes(paths, outputs, embedder, loaded.card.classes, config)
    settings = resolve_generator(config.generator, loaded.card)
    _warn_of_thresholds(config, loaded.card)
    score_map = _find_score_map(config, loaded.card)
    how_read = config.dataset.images.deep_range
    categories, weights = _number_categories(loaded), hash_weights(embedder)
    results = Results(categories, settings, score_map, weights, config.polygons, how_read)
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
    shown = overlays[0] if len(overlays) == 1 else f"{out_dir}{os.sep} ({len(overlays)} overlays)"
    print(f"images: {printable(shown)}")
    print(f"COCO json: {printable(out_dir / RESULTS_NAME)}")
    print(f"{name_count(results.mask_count, 'mask')} in {name_count(len(overlays), 'image')}, {seconds:.2f} s an image")
    return 2 if config.strict and len(overlays) < len(jobs) else 0


def find_images(inputs: list[str], out_dir: Path | None = None) -> list[Path]:
    """Return the images that files, folders and patterns name, each once, in the order given.

    Args:
        out_dir: what a pattern with `**` finds there from outside is left out, and said: overlays of an earlier run.

    Raises:
        UserError: with a line for each input that names no image.
    """
    found, problems = {}, []
    for text in inputs:
        try:
            for path in _expand(text, out_dir):
                found.setdefault(os.path.realpath(path), path)
        except UserError as error:
            problems.append(f"--input {printable(text)}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return list(found.values())


def _expand(text: str, out_dir: Path | None) -> list[Path]:
    path = Path(text)
    if os.path.isdir(text):
        return _list_folder(path)
    if os.path.exists(text):  # Path.exists raises on a name that is too long
        if path.suffix.lower() in VIDEO_SUFFIXES:
            raise UserError("a video; cut it into images first, as in: ffmpeg -i video.mp4 frames/%05d.png")
        return [path]
    if not glob.has_magic(text):
        raise UserError("no such file or folder")
    images = [Path(name) for name in sorted(_match(text)) if _is_image(Path(name))]
    if out_dir and "**" in text:
        images = _leave_out(images, Path(text), out_dir)
    if not images:
        raise UserError("no image matches this pattern")
    return images


def _match(pattern: str) -> set[str]:
    """Return the names that match a pattern.

    `**` looks into each folder once, by whatever name it comes to it: links that lead back have no end.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        return set(glob.glob(pattern))
    place = parts.index("**")
    starts = glob.glob(os.path.join(*parts[:place])) if place else ["."]
    rest = parts[place + 1 :] or ("*",)
    folders = itertools.chain.from_iterable(map(_walk, starts))
    return {name for folder in folders for name in _match(os.path.join(glob.escape(folder), *rest))}


def _walk(start: str) -> Iterator[str]:
    """Yield a folder and all folders below it that are not hidden, each once; linked folders come last."""
    waiting, seen = deque([start]), set()
    while waiting:
        folder = waiting.popleft()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError:  # not a folder, or none that can be read
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        below = [entry for entry in entries if os.path.isdir(entry.path) and not entry.name.startswith(".")]
        waiting.extend(entry.path for entry in below)


def _leave_out(images: list[Path], pattern: Path, out_dir: Path) -> list[Path]:
    """Return the paths outside `out_dir`; all of them where the pattern itself starts there."""
    root, start = out_dir.resolve(), Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    if start.resolve().is_relative_to(root):
        return images
    left = [path for path in images if not Path(os.path.realpath(path)).is_relative_to(root)]
    if len(left) < len(images):
        print(f"{printable(out_dir)}: {name_count(len(images) - len(left), 'image')} left out: there the results go")
    return left


def _list_folder(folder: Path) -> list[Path]:
    try:
        images = sorted(path for path in folder.iterdir() if _is_image(path))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    if not images:
        raise UserError(f"no image in this folder; for those of its subfolders ask for '{folder / '**' / '*'}'")
    return images


def _is_image(path: Path) -> bool:
    """Whether a name is an image's; broken links count, so that they are reported."""
    is_ours = path.name.endswith((BESIDE_MARK + OVERLAY_SUFFIX, BESIDE_MARK + LABELS_SUFFIX))
    is_named_so = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    return is_named_so and not is_ours and not os.path.isdir(path)


def name_overlays(paths: list[Path], out_dir: Path) -> list[Path]:
    """Return where each image's overlay goes, as `name_outputs` has it."""
    return [overlay for (overlay,) in name_outputs(paths, out_dir, (OVERLAY_SUFFIX,))]


def name_outputs(paths: list[Path], out_dir: Path, suffixes: tuple[str, ...]) -> list[tuple[Path, ...]]:
    """Return the paths of each image's outputs: named after it, unique, never over an input or another program's file.

    Args:
        suffixes: of the files that each image gets.
    """
    # Case is ignored, because on Windows and macOS a.png is A.png. An input may be a link to a file in that folder.
    files = [file for path in paths for file in (path, Path(os.path.realpath(path)))]
    taken = {file.name.casefold() for file in files if file.parent.samefile(out_dir)}
    lies_beside = bool(taken)
    outputs = []
    for path in paths:
        stem = _sanitize(path.stem)
        names = next(names for names in _list_names(stem, "", suffixes) if taken.isdisjoint(map(str.casefold, names)))
        if lies_beside or not _are_replaceable(out_dir, names):
            names = next(
                names
                for names in _list_names(stem, BESIDE_MARK, suffixes)
                if taken.isdisjoint(map(str.casefold, names)) and _are_replaceable(out_dir, names)
            )
        outputs.append(tuple(out_dir / name for name in names))
        taken.update(map(str.casefold, names))
    return outputs


def _list_names(stem: str, mark: str, suffixes: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield names for an image's outputs: without a number, then with 2, 3, ..."""
    for tail in itertools.chain([""], (f"_{number}" for number in itertools.count(2))):
        yield [f"{stem}{tail}{mark}{suffix}" for suffix in suffixes]


def _are_replaceable(out_dir: Path, names: list[str]) -> bool:
    return all(is_replaceable(out_dir / name) for name in names)


def _sanitize(stem: str) -> str:
    safe = "".join(letter if letter.isprintable() and letter not in '<>:"/\\|?*' else "_" for letter in stem)
    return safe.encode()[:MAX_STEM_BYTES].decode(errors="ignore").strip(". ") or "image"


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
    """The content of an image file."""

    pixels: np.ndarray  # H x W x 3, uint8, RGB
    digest: str

    @property
    def key(self) -> str:
        """Return the name of its embedding in the store."""
        return image_key(self.digest, self.pixels.shape[:2])


def _predict_all(jobs: list[_Job], embedder: Embedder, config: Config, results: Results, journal: Journal) -> int:
    """Predict the images one by one into `results`, skip unreadable ones, and return how many were predicted.

    The next image is read, and the last overlay drawn and written, while the model works on this one.
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
            drawn = functools.partial(_draw, image.pixels, masks, results, config.opacity)
            written = writer.submit(_write, job.overlay, drawn, journal, entry)
            done += 1
            if len(masks) == 0:
                tqdm.write(f"{printable(job.path)}: no masks: {masks.report.explain_no_masks(results.settings)}")
        if written:
            written.result()
    return done


def _read_ahead(reader: Executor, jobs: list[_Job], config: Config) -> Iterator[Future]:
    """Yield the images in order, while a thread reads the next one."""
    following = reader.submit(_read, jobs[0].path, config)
    for job in jobs[1:]:
        current, following = following, reader.submit(_read, job.path, config)
        yield current
    yield following


def _read(path: Path, config: Config) -> _Image:
    return _Image(*read_hashed_image(path, config.dataset.images))


def _find_masks(embedder: Embedder, image: _Image, path: Path, results: Results) -> GeneratedMasks:
    advice = f"--generator.points_per_batch below {results.settings.points_per_batch}, or a smaller --model.type"
    with reporting_out_of_memory(printable(path), advice):
        embedding = embedder.embed_image(image.key, image.pixels)  # from the store where it was predicted before
        return generate_masks(embedder.model, image.pixels, results.settings, embedding)


def _draw(pixels: np.ndarray, masks: GeneratedMasks, results: Results, opacity: float) -> np.ndarray:
    """Return the overlay; a model with categories gives them their colours and a legend."""
    if masks.has_classes:
        return render_named_overlay(pixels, masks.rles, masks.classes, list(results.categories.values()), opacity)
    return render_overlay(pixels, masks.rles, opacity)


def _write(path: Path, draw: Callable[[], np.ndarray], journal: Journal, entry: dict) -> None:
    """Write an overlay, and note in the journal that its image is finished."""
    with _writing(path):
        write_image(path, draw())
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


def _number_categories(loaded: LoadedModel) -> dict[int, str]:
    """Return the model's categories, names by id, in the order of its classes; one if it has no classes."""
    card = loaded.card
    if loaded.model.class_head is not None:
        return dict(zip(card.category_ids, card.categories, strict=True))
    return {1: card.categories[0] if card and len(card.categories) == 1 else "object"}
