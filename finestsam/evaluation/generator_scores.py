"""Run the automatic mask generator on labelled images, and tune its thresholds on them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig, ImagesConfig
from finestsam.evaluation.candidates import Candidates, clean, read_embedded, select
from finestsam.evaluation.class_scores import detect
from finestsam.evaluation.coco_scores import CocoScorer, Detections
from finestsam.evaluation.thresholds import Calibration, SearchResult, calibrate, search
from finestsam.prediction.embedder import Embedder
from finestsam.prediction.generator import generate_masks
from finestsam.prediction.results import FilterReport
from finestsam.records import Record


def find_all(
    embedder: Embedder,
    records: Sequence[Record],
    settings: GeneratorConfig,
    images: ImagesConfig,
    title: str = "generator",
) -> list[Detections | None]:
    """Run the generator on each image; None for one that broke since it was checked.

    Where it returns no mask in an image, the filters that removed all candidates are printed.
    """
    found: list[Detections | None] = []
    empty: list[FilterReport] = []
    for record in tqdm(records, desc=title, disable=not sys.stderr.isatty(), leave=False):
        read = read_embedded(embedder, record, images)
        if read is None:
            found.append(None)
            continue
        pixels, embedding = read
        masks = generate_masks(embedder.model, pixels, settings, embedding)
        found.append(detect(masks))
        if len(masks) == 0:
            empty.append(masks.report)
    if empty:
        why = sum(empty, FilterReport()).explain_no_masks(settings)
        print(f"{title}: no masks in {len(empty)} of {len(records)} images: {why}")
    return found


@dataclass(frozen=True)
class Tuned:
    """The generator with tuned settings, measured on the images that they were tuned on."""

    result: SearchResult
    found: list[Detections]  # in each image
    calibration: Calibration | None

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the settings by their names in `GeneratorConfig`; without classes no_object_thresh is left out."""
        has_classes = any(detections.classes is not None for detections in self.found)
        names = [name for name in GENERATOR_DEFAULTS if has_classes or name != "no_object_thresh"]
        return {name: getattr(self.result.settings, name) for name in names}

    def describe(self) -> dict[str, Any]:
        """Return the settings and the score map as they are stored beside the weights."""
        settings = self.chosen
        return settings | ({"score_map": self.calibration.knots} if self.calibration else {})

    def measure(self, records: Sequence[Record]) -> dict[str, float]:
        """Return COCO's figures, masks per image, and the calibration error of the uncorrected scores."""
        figures = CocoScorer(records, self.found).score()
        figures["masks_per_image"] = sum(len(image.rles) for image in self.found) / max(len(self.found), 1)
        if self.calibration:
            figures["calibration_error"] = self.calibration.error
        return figures


def choose_grids(settings: GeneratorConfig, fixed: frozenset[str]) -> tuple[int, ...]:
    """Return the points along each side of the grids that tuning tries."""
    whole = settings.points_per_side
    return (whole,) if "points_per_side" in fixed or whole < 4 else (whole // 2, whole)


def open_for_tuning(settings: GeneratorConfig, fixed: frozenset[str]) -> GeneratorConfig:
    """Return the settings that tuning starts from: one mask for each point, unless the user has set masks_per_point.

    With thresholds tuned for F1, one mask of each point found as much as three (AP 0.395 and 0.400 of cell nuclei,
    0.171 and 0.168 of fingernails; F1 within 0.01), and only a third of the masks is computed.
    """
    return settings if "masks_per_point" in fixed else replace(settings, masks_per_point="best")


def list_fixed(settings: GeneratorConfig) -> frozenset[str]:
    """Return the names of the settings that the user has set."""
    return frozenset(name for name in GENERATOR_DEFAULTS if getattr(settings, name) is not None)


def tune(
    records: Sequence[Record],
    candidates: Sequence[Candidates],
    start: GeneratorConfig,
    fixed: frozenset[str],
    goal: str,
) -> Tuned:
    """Choose the settings that do best on these images, as `thresholds.search` does."""
    result = search(records, candidates, start, fixed, goal)
    found = []
    for record, image in zip(records, candidates, strict=True):
        masks = clean(image[select(image, result.settings)], record, result.settings).masks
        found.append(detect(masks))
    return Tuned(result, found, calibrate(candidates))
