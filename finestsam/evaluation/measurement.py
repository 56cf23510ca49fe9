"""What one model does on labelled pictures, and how it differs from another: figures, intervals, picture by picture."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from finestsam.data.index import Record
from finestsam.data.semantic import ClassTable
from finestsam.evaluation.background import BackgroundScores, summarize_background
from finestsam.evaluation.class_scores import score_classes
from finestsam.evaluation.coco_scores import CocoScorer, Detections
from finestsam.evaluation.prompt_scores import ObjectScore, summarize_scores
from finestsam.evaluation.thresholds import Calibration
from finestsam.prediction.overlay import colour_classes

DRAWS = 300
# Of the draws lie between the ends of an interval.
CONFIDENCE = 0.95
PROMPT_MEASURES = ("iou", "dice", "best_iou", "boundary_iou")
GENERATOR_MEASURES = ("ap", "ar_1000")


@dataclass
class Measurement:
    """One model on the pictures of a set; every model gets the same ones, in the same order."""

    records: Sequence[Record]
    found: Sequence[Detections] | None  # what the generator found in each picture; None: it did not run
    prompted: dict[str, list[ObjectScore]] = field(default_factory=dict)  # by kind of prompt
    clicks: dict[int, float] = field(default_factory=dict)  # mean IoU after so many corrective clicks
    background: list[BackgroundScores] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)  # further figures, by their whole names
    calibration: Calibration | None = None  # of the scores of candidates, where thresholds were searched
    table: ClassTable | None = None  # of the classes in `found`; None: it has none

    def keep(self, image_ids: Collection[int]) -> "Measurement":
        """Return the same of fewer pictures; means over clicks and further figures stay those of all."""
        places = [place for place, record in enumerate(self.records) if record.image_id in image_ids]
        return replace(
            self,
            records=[self.records[place] for place in places],
            found=None if self.found is None else [self.found[place] for place in places],
            prompted={
                kind: [score for score in scores if score.image_id in image_ids]
                for kind, scores in self.prompted.items()
            },
            background=[one for one in self.background if one.image_id in image_ids],
        )

    @cached_property
    def scorer(self) -> CocoScorer | None:
        return None if self.found is None else CocoScorer(self.records, self.found)

    @cached_property
    def by_class(self) -> dict[str, float]:
        """Return what `score_classes` measures; nothing where no categories are known."""
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
            figures["generator/masks_per_image"] = sum(len(one.rles) for one in self.found) / max(len(self.found), 1)
        figures |= {f"classes/{name}": value for name, value in self.by_class.items()}
        figures |= {f"clicks/iou_{count}": value for count, value in self.clicks.items()}
        figures |= {f"background/{name}": value for name, value in summarize_background(self.background).items()}
        return figures | self.extra

    def colour_found(self, place: int) -> np.ndarray | None:
        """Return the colours of a picture's masks by their categories, K x 3; None where none are known."""
        return None if self.table is None else self._colour(self.found[place].classes)

    def colour_truth(self, place: int) -> np.ndarray | None:
        """Return the colours of a picture's objects by their categories, G x 3; None where none are known."""
        if self.table is None:
            return None
        return self._colour([self.table.by_category.get(one.category_id, 0) for one in self.records[place].annotations])

    def _colour(self, classes: Sequence[int]) -> np.ndarray:
        return colour_classes(len(self.table.names))[np.asarray(classes, dtype=int)]

    @cached_property
    def sums(self) -> dict[str, np.ndarray]:
        """Return for each prompted measure its sum in each picture, and under `{kind}/count` how many it is over."""
        places = {record.image_id: place for place, record in enumerate(self.records)}
        sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(self.records)))
        for kind, scores in self.prompted.items():
            for score in scores:
                if score.image_id not in places:
                    continue
                place = places[score.image_id]
                sums[f"{kind}/count"][place] += 1
                for name in PROMPT_MEASURES:
                    sums[f"{kind}/{name}"][place] += getattr(score, name)
        for one in self.background:
            if one.image_id in places:
                place = places[one.image_id]
                sums["background/count"][place] += len(one.scores)
                sums["background/score"][place] += one.scores.sum(dtype=float)
                sums["background/taken_share"][place] += one.is_taken.sum()
        return dict(sums)

    @property
    def sampled(self) -> list[str]:
        """Return the names of the figures that are means over prompts."""
        return [name for name in self.sums if not name.endswith("/count")]

    def list_pictures(self) -> list[dict[str, object]]:
        """Return a row of figures for each picture."""
        rows = []
        for place, record in enumerate(self.records):
            row: dict[str, object] = {"file_name": record.file_name, "objects": len(record.annotations)}
            for name in self.sampled:
                count = self.sums[f"{name.split('/')[0]}/count"][place]
                row[name] = float(self.sums[name][place] / count) if count else None
            if self.scorer:
                row["generator/masks"] = len(self.found[place].rles)
                row |= {f"generator/{name}": value for name, value in self.scorer.resample([place]).items()}
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Difference:
    """How much more one model has than another, and between which ends it lies if other pictures had been drawn."""

    value: float
    low: float
    high: float


def keep_common(ours: Measurement, theirs: Measurement) -> tuple[Measurement, Measurement]:
    """Return both on the pictures that both could be measured on: one may break between, or be too thin for one."""
    known, their_known = ({record.image_id for record in one.records} for one in (ours, theirs))
    if known == their_known:
        return ours, theirs
    return ours.keep(known & their_known), theirs.keep(known & their_known)


def compare(ours: Measurement, theirs: Measurement, seed: int = 0) -> dict[str, Difference]:
    """Return the differences of the headline figures, with percentile intervals of a bootstrap over pictures.

    Both models are drawn the same pictures: what is hard for both does not count as a difference. Source: Efron and
    Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    count = len(ours.records)
    draws = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    everything = np.arange(count)[None]
    differences = {}
    for name in _list_common(ours, theirs):
        value = float((_draw(ours, name, everything) - _draw(theirs, name, everything))[0])
        drawn = _draw(ours, name, draws) - _draw(theirs, name, draws)
        ends = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        differences[name] = Difference(value, float(ends[0]), float(ends[1]))
    return differences


def _list_common(ours: Measurement, theirs: Measurement) -> list[str]:
    names = [name for name in ours.sampled if name in theirs.sums]
    if ours.scorer and theirs.scorer and ours.scorer.has_objects:
        names += [f"generator/{name}" for name in GENERATOR_MEASURES]
    return [name for name in names if name in ours.figures and name in theirs.figures]


def _draw(measurement: Measurement, name: str, draws: np.ndarray) -> np.ndarray:
    """Return a figure for each draw of pictures, D x I places; not a number where a draw has no object."""
    kind, measure = name.split("/")
    if kind == "generator":
        return np.array([measurement.scorer.resample(places)[measure] for places in draws])
    sums, counts = measurement.sums[name][draws].sum(axis=1), measurement.sums[f"{kind}/count"][draws].sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(draws), np.nan), where=counts > 0)
