"""The figures of one model on labelled images, and its differences from another model with bootstrap intervals."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from finestsam.data.semantic import ClassTable
from finestsam.evaluation.class_scores import score_classes
from finestsam.evaluation.coco_scores import CocoScorer, Detections
from finestsam.evaluation.errors import Mistakes, count_mistakes, sum_mistakes
from finestsam.evaluation.prompt_scorer import BackgroundScores, summarize_background
from finestsam.evaluation.prompt_scores import ObjectScore, summarize_scores
from finestsam.evaluation.subject import Setup
from finestsam.evaluation.thresholds import Calibration
from finestsam.prediction.overlay import colour_classes
from finestsam.records import Record

BOOTSTRAP_SAMPLES = 300
# Share of the bootstrap samples inside the reported interval.
CONFIDENCE = 0.95
# With fewer images the bootstrap samples are too similar for an interval.
FEWEST_IMAGES = 5
TOO_FEW = "too few images for an interval"
PROMPT_MEASURES = ("iou", "dice", "best_iou", "boundary_iou")
GENERATOR_MEASURES = ("ap", "ar_100", "ar_1000", "f1")
COUNTING_MEASURES = ("mean_absolute_error", "relative_error")


@dataclass
class Measurement:
    """One model on the images of a set; all models get the same images in the same order."""

    records: Sequence[Record]
    found: Sequence[Detections] | None  # the generator's masks in each image; None: it did not run
    prompted: dict[str, list[ObjectScore]] = field(default_factory=dict)  # by kind of prompt
    clicks: dict[int, float] = field(default_factory=dict)  # mean IoU after so many corrective clicks
    background: list[BackgroundScores] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)  # further figures, by their full names
    calibration: Calibration | None = None  # of the candidates' scores; None: thresholds were not tuned
    table: ClassTable | None = None  # of the classes in `found`; None: it has none
    setup: Setup | None = None  # weights, image size and thresholds; None: results of another program
    _resampled: dict[bytes, dict[str, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def keep(self, image_ids: Collection[int]) -> "Measurement":
        """Return the measurement of fewer images; `clicks` and `extra` stay those of all images."""
        indices = [index for index, record in enumerate(self.records) if record.image_id in image_ids]
        return replace(
            self,
            records=[self.records[index] for index in indices],
            found=None if self.found is None else [self.found[index] for index in indices],
            prompted={
                kind: [score for score in scores if score.image_id in image_ids]
                for kind, scores in self.prompted.items()
            },
            background=[scores for scores in self.background if scores.image_id in image_ids],
        )

    @cached_property
    def scorer(self) -> CocoScorer | None:
        return None if self.found is None else CocoScorer(self.records, self.found)

    @cached_property
    def mistakes(self) -> list[dict[str, Mistakes]]:
        """Return each image's counts by size; empty where the generator did not run."""
        return [] if self.found is None else count_mistakes(self.records, self.found)

    @cached_property
    def counts(self) -> list[Mistakes]:
        """Return each image's counts of all sizes."""
        return [sum_mistakes([image])["all"] for image in self.mistakes]

    @cached_property
    def by_class(self) -> dict[str, float]:
        """Return the figures of `score_classes`; empty where no categories are known."""
        is_known = self.found is not None and self.table is not None
        return score_classes(self.records, self.found, self.table) if is_known else {}

    @cached_property
    def figures(self) -> dict[str, float]:
        """Return everything measured: `point/iou`, `generator/ap`, ..."""
        figures = {}
        for kind, scores in self.prompted.items():
            figures |= {f"{kind}/{name}": value for name, value in summarize_scores(scores).items()}
        if self.scorer:
            figures |= {f"generator/{name}": value for name, value in self.scorer.score().items()}
            mask_count = sum(len(detections.rles) for detections in self.found)
            figures["generator/masks_per_image"] = mask_count / max(len(self.found), 1)
            figures |= {f"counting/{name}": value for name, value in self._measure_counting().items()}
        figures |= {f"classes/{name}": value for name, value in self.by_class.items()}
        figures |= {f"clicks/iou_{count}": value for count, value in self.clicks.items()}
        figures |= {f"background/{name}": value for name, value in summarize_background(self.background).items()}
        return figures | self.extra

    def _measure_counting(self) -> dict[str, float]:
        """Return the counting error, as a mean over images and divided by the number of objects."""
        if not self.counts:
            return {}
        error = sum(counts.counting_error for counts in self.counts)
        objects = sum(counts.object_count for counts in self.counts)
        figures = {"mean_absolute_error": error / len(self.counts)}
        return figures | ({"relative_error": error / objects} if objects else {})

    def colour_found(self, index: int) -> np.ndarray | None:
        """Return the colours of an image's masks by their categories, K x 3; None where none are known."""
        return None if self.table is None else self._colour(self.found[index].classes)

    def colour_truth(self, index: int) -> np.ndarray | None:
        """Return the colours of an image's objects by their categories, G x 3; None where none are known."""
        if self.table is None:
            return None
        annotations = self.records[index].annotations
        return self._colour([self.table.by_category.get(annotation.category_id, 0) for annotation in annotations])

    def _colour(self, classes: Sequence[int]) -> np.ndarray:
        return colour_classes(len(self.table.names))[np.asarray(classes, dtype=int)]

    @cached_property
    def sums(self) -> dict[str, np.ndarray]:
        """Return for each measure of prompts its sum in each image, I, and as `{kind}/count` the number of prompts."""
        indices = {record.image_id: index for index, record in enumerate(self.records)}
        sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(self.records)))
        for kind, scores in self.prompted.items():
            for score in scores:
                if score.image_id not in indices:
                    continue
                index = indices[score.image_id]
                sums[f"{kind}/count"][index] += 1
                for name in PROMPT_MEASURES:
                    sums[f"{kind}/{name}"][index] += getattr(score, name)
        for background in self.background:
            if background.image_id in indices:
                index = indices[background.image_id]
                sums["background/count"][index] += len(background.scores)
                sums["background/score"][index] += background.scores.sum(dtype=float)
                sums["background/taken_share"][index] += background.is_taken.sum()
        return dict(sums)

    @cached_property
    def counting_sums(self) -> dict[str, np.ndarray]:
        """Return for each counting measure its numerator and denominator in each image, I x 2."""
        errors = [counts.counting_error for counts in self.counts]
        return {
            "mean_absolute_error": np.array([errors, np.ones(len(errors))]).T,
            "relative_error": np.array([errors, [counts.object_count for counts in self.counts]]).T,
        }

    @property
    def sampled(self) -> list[str]:
        """Return the names of the figures that are means over prompts."""
        return [name for name in self.sums if not name.endswith("/count")]

    def resample_generator(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Return COCO's figures for each sample of images, S x I indices; they are computed once."""
        key = samples.tobytes()
        if key not in self._resampled:
            figures = [self.scorer.resample(indices) for indices in samples]
            self._resampled[key] = {name: np.array([row[name] for row in figures]) for name in GENERATOR_MEASURES}
        return self._resampled[key]

    def list_images(self) -> list[dict[str, object]]:
        """Return a row of figures for each image."""
        rows = []
        for index, record in enumerate(self.records):
            row: dict[str, object] = {"file_name": record.file_name, "objects": len(record.annotations)}
            for name in self.sampled:
                count = self.sums[f"{name.split('/')[0]}/count"][index]
                row[name] = float(self.sums[name][index] / count) if count else None
            if self.scorer:
                row["generator/masks"] = len(self.found[index].rles)
                row |= {f"generator/{name}": value for name, value in self.scorer.resample([index]).items()}
                row |= {f"counting/{name}": value for name, value in _list_counts(self.counts[index]).items()}
            rows.append(row)
        return rows


def _list_counts(counts: Mistakes) -> dict[str, int]:
    """Return the columns of an image's counts."""
    objects, masks = counts.objects, counts.masks
    return {
        "labelled": counts.object_count,
        **{kind: objects[kind] for kind in ("found", "missed", "merged", "split")},
        "invented": masks["invented"],
        "duplicates": masks["duplicate"],
        "fragments": masks["fragment"],
        "merging_masks": masks["merging"],
        "masks_in_crowd": masks["in_crowd"],
    }


@dataclass(frozen=True)
class Difference:
    """A figure of one model minus that of another, with a bootstrap interval over images."""

    value: float
    low: float | None = None  # None: too few images for an interval
    high: float | None = None

    @property
    def is_positive(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def is_negative(self) -> bool:
        return self.high is not None and self.high < 0


def keep_common(ours: Measurement, theirs: Measurement) -> tuple[Measurement, Measurement]:
    """Return both on the images that both were measured on: an image may break, or be too thin for one model."""
    known, their_known = ({record.image_id for record in measured.records} for measured in (ours, theirs))
    if known == their_known:
        return ours, theirs
    return ours.keep(known & their_known), theirs.keep(known & their_known)


def compare(ours: Measurement, theirs: Measurement, seed: int = 0) -> dict[str, Difference]:
    """Return the differences of the headline figures, with percentile intervals of a bootstrap over images.

    Both models get the same samples of images, so that images that are hard for both do not widen the interval. Source:
    Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    count = len(ours.records)
    if count == 0:
        return {}
    samples = np.random.default_rng(seed).integers(0, count, (BOOTSTRAP_SAMPLES, count))
    all_images = np.arange(count)[None]
    differences = {}
    for name in _list_common(ours, theirs):
        value = float((_resample(ours, name, all_images) - _resample(theirs, name, all_images))[0])
        if count < FEWEST_IMAGES:
            differences[name] = Difference(value)
            continue
        sampled = _resample(ours, name, samples) - _resample(theirs, name, samples)
        ends = np.nanquantile(sampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        differences[name] = Difference(value, float(ends[0]), float(ends[1]))
    return differences


def _list_common(ours: Measurement, theirs: Measurement) -> list[str]:
    names = [name for name in ours.sampled if name in theirs.sums]
    if ours.scorer and theirs.scorer:
        names += [f"generator/{name}" for name in GENERATOR_MEASURES]
        names += [f"counting/{name}" for name in COUNTING_MEASURES]
    return [name for name in names if name in ours.figures and name in theirs.figures]


def _resample(measurement: Measurement, name: str, samples: np.ndarray) -> np.ndarray:
    """Return a figure for each sample of images, S x I indices; NaN where a sample has no object."""
    kind, measure = name.split("/")
    if kind == "generator":
        return measurement.resample_generator(samples)[measure]
    if kind == "counting":
        sums, counts = measurement.counting_sums[measure][samples].sum(axis=1).T
    else:
        counted = measurement.sums[f"{kind}/count"]
        sums, counts = measurement.sums[name][samples].sum(axis=1), counted[samples].sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(samples), np.nan), where=counts > 0)
