"""Tune the generator's settings on labelled images, and calibrate the model's scores."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from finestsam.config import GeneratorConfig
from finestsam.evaluation.candidates import Candidates, MeasuredMasks, clean, match, select
from finestsam.records import Record

# COCO's thresholds, at which a mask finds an object.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# The cost of a mask for the goal `recall`, where masks of nothing annotated need not be wrong: finding one object is
# worth a hundred masks.
MASK_COST = 0.01
# The values that tuning tries beside those it starts from; of predicted IoUs these are quantiles of the candidates'.
SCORE_QUANTILES = np.linspace(0, 0.98, 50)
STABILITIES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.95)
NO_OBJECT_PROBABILITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
OVERLAPS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
REGION_AREAS = (0, 16, 64, 256)
ROUNDS = 4
# The settings that are tuned, those that are cheapest to change first.
SEARCHED = (
    "pred_iou_thresh", "stability_score_thresh", "no_object_thresh", "box_nms_thresh", "points_per_side",
    "crop_n_layers",
)  # fmt: skip


@dataclass(frozen=True)
class OperatingPoint:
    """The generator's figures with one choice of its settings; they do not depend on the ranking of its masks."""

    f1: float  # harmonic mean of precision and recall over all images, mean over COCO's IoU thresholds
    recall: float  # mean over the same thresholds
    masks_per_object: float

    def measure(self, goal: str) -> float:
        """Return what tuning maximises: F1, or for partly annotated images recall minus the cost of masks."""
        return self.f1 if goal == "f1" else self.recall - MASK_COST * self.masks_per_object


def measure_operating_point(
    found: Sequence[MeasuredMasks], chosen: Sequence[np.ndarray] | None = None
) -> OperatingPoint:
    """Return the figures of the masks of all images.

    Args:
        found: of each image, by falling score.
        chosen: of each image the indices of the masks that count; None: all do.
    """
    hits, masks, objects = np.zeros(len(IOU_THRESHOLDS)), np.zeros(len(IOU_THRESHOLDS)), 0
    for index, image in enumerate(found):
        ious, crowd_shares = image.ious, image.crowd_shares
        if chosen is not None:
            ious, crowd_shares = ious[chosen[index]], crowd_shares[chosen[index]]
        is_hit = match(ious, IOU_THRESHOLDS) >= 0
        is_ignored = ~is_hit & (crowd_shares >= IOU_THRESHOLDS[:, None])
        hits += is_hit.sum(axis=1)
        masks += (~is_ignored).sum(axis=1)
        objects += ious.shape[1]
    f1 = 2 * hits / np.maximum(masks + objects, 1)
    return OperatingPoint(
        float(f1.mean()), float((hits / max(objects, 1)).mean()), float(masks.mean() / max(objects, 1))
    )


@dataclass(frozen=True)
class SearchResult:
    """The best settings found, with the figures of the settings before and after tuning."""

    settings: GeneratorConfig
    before: OperatingPoint
    after: OperatingPoint
    tried: int


def search(
    records: Sequence[Record], found: Sequence[Candidates], start: GeneratorConfig, fixed: frozenset[str], goal: str
) -> SearchResult:
    """Return the generator's settings that are best on these images: change one at a time until none helps.

    Args:
        found: one for each record.
        start: without None.
        fixed: names of settings that stay.
        goal: `f1` or `recall`.
    """
    known: dict[tuple, OperatingPoint] = {}

    def evaluate(settings: GeneratorConfig) -> OperatingPoint:
        key = tuple(getattr(settings, name) for name in SEARCHED)
        if key not in known:
            known[key] = measure_operating_point(found, [select(image, settings) for image in found])
        return known[key]

    options = _list_options(found, start, fixed)
    starts = [dataclasses.replace(start, min_mask_region_area=0)]
    for share in (0.25, 0.75):
        middle = {name: values[int(share * (len(values) - 1))] for name, values in options.items()}
        starts.append(dataclasses.replace(starts[0], **middle))
    ends = [_climb(settings, options, lambda settings: evaluate(settings).measure(goal)) for settings in starts]
    best = max(ends, key=lambda settings: evaluate(settings).measure(goal))
    operating_point = evaluate(best)
    if "min_mask_region_area" in fixed:
        best = dataclasses.replace(best, min_mask_region_area=start.min_mask_region_area)
    else:
        best, operating_point = _choose_region_area(records, found, best, operating_point, goal)
    return SearchResult(best, evaluate(starts[0]), operating_point, len(known))


def _list_options(found: Sequence[Candidates], start: GeneratorConfig, fixed: frozenset[str]) -> dict[str, list[float]]:
    """Return the values to try of each setting that is not fixed, rising."""
    scores = np.concatenate([image.masks.scores for image in found]) if found else np.zeros(0)
    scores = scores[np.isfinite(scores)]
    levels = np.quantile(scores, SCORE_QUANTILES).clip(0, 1) if len(scores) else np.zeros(1)
    grids = sorted({int(grid) for image in found for grid in np.unique(image.points_per_side)})
    options = {
        # Rounded down, so that the candidate at the quantile still passes.
        "pred_iou_thresh": [float(np.floor(level * 1e4) / 1e4) for level in levels],
        "stability_score_thresh": list(STABILITIES),
        "no_object_thresh": list(NO_OBJECT_PROBABILITIES) if any(image.masks.has_classes for image in found) else [],
        "box_nms_thresh": list(OVERLAPS),
        "points_per_side": grids or [start.points_per_side],
        "crop_n_layers": list(range(start.crop_n_layers + 1)),
    }
    return {name: sorted(set(values)) for name, values in options.items() if name not in fixed and len(set(values)) > 1}


def _climb(
    settings: GeneratorConfig, options: dict[str, list[float]], measure: Callable[[GeneratorConfig], float]
) -> GeneratorConfig:
    best = measure(settings)
    for _ in range(ROUNDS):
        before = best
        for name, values in options.items():
            for value in values:
                changed = dataclasses.replace(settings, **{name: value})
                if (result := measure(changed)) > best:
                    settings, best = changed, result
        if best == before:
            break
    return settings


def _choose_region_area(
    records: Sequence[Record],
    found: Sequence[Candidates],
    settings: GeneratorConfig,
    operating_point: OperatingPoint,
    goal: str,
) -> tuple[GeneratorConfig, OperatingPoint]:
    chosen = [image[select(image, settings)] for image in found]
    for area in REGION_AREAS[1:]:
        changed = dataclasses.replace(settings, min_mask_region_area=area)
        result = measure_operating_point(
            [clean(image, record, changed) for image, record in zip(chosen, records, strict=True)]
        )
        if result.measure(goal) > operating_point.measure(goal):
            settings, operating_point = changed, result
    return settings, operating_point


# Bins of the scores, from 0 to 1.
BINS = 10
# Knots of the monotone map: enough for its shape, few enough to read in best.json.
MOST_KNOTS = 16


@dataclass(frozen=True)
class Calibration:
    """How the predicted IoU relates to the measured one."""

    centres: np.ndarray  # B, mean prediction in each bin; bins without a mask are left out
    measured: np.ndarray  # B, mean IoU with the best-fitting object
    counts: np.ndarray  # B
    error: float  # expected calibration error: the mean distance of the two, weighted by count
    knots: list[list[float]]  # [predicted, measured] pairs, both rising: the map that corrects scores


def calibrate(found: Sequence[Candidates]) -> Calibration | None:
    """Compare the scores of candidates with their IoU with the best-fitting object, and fit a map that corrects them.

    The error is that of Guo et al. (arXiv 1706.04599) with an IoU in place of a hit rate; the map is the isotonic
    regression, by pooling adjacent violators (Barlow et al., Statistical Inference under Order Restrictions, 1972).

    Returns:
        None where there is no candidate.
    """
    scores = np.concatenate([image.masks.scores for image in found]) if found else np.zeros(0)
    if len(scores) == 0:
        return None
    ious = np.concatenate([image.ious.max(axis=1, initial=0.0) for image in found])
    is_known = np.isfinite(scores)
    scores, ious = scores[is_known].astype(float), ious[is_known]
    bins = np.clip((scores * BINS).astype(int), 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    used = counts > 0
    centres = np.bincount(bins, scores, BINS)[used] / counts[used]
    measured = np.bincount(bins, ious, BINS)[used] / counts[used]
    error = float((np.abs(centres - measured) * counts[used]).sum() / max(counts.sum(), 1))
    return Calibration(centres, measured, counts[used], error, _fit_knots(scores, ious))


def _fit_knots(scores: np.ndarray, ious: np.ndarray) -> list[list[float]]:
    order = np.argsort(scores, kind="stable")
    groups = np.array_split(order, min(4 * MOST_KNOTS, len(order)))
    blocks: list[list[float]] = []  # sum of predictions, sum of measurements, count; the mean measurement rises
    for group in groups:
        blocks.append([float(scores[group].sum()), float(ious[group].sum()), len(group)])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] >= blocks[-1][1] * blocks[-2][2]:
            last = blocks.pop()
            blocks[-1] = [left + right for left, right in zip(blocks[-1], last, strict=True)]
    knots = [[predicted / count, measured / count] for predicted, measured, count in blocks]
    if len(knots) > MOST_KNOTS:
        knots = [knots[index] for index in np.linspace(0, len(knots) - 1, MOST_KNOTS).round().astype(int)]
    return [[round(predicted, 5), round(measured, 5)] for predicted, measured in knots]
