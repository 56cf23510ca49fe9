"""COCO's average precision and recall of instance masks, by pycocotools, here without categories.

All objects have one category, because SAM's generator knows none; `class_scores` distinguishes categories. Crowd
regions are ignored, as in COCO: masks in them are neither right nor wrong. All masks count: pycocotools' limit of
detections is raised to the number of masks.
"""

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finestsam.masks import rle_area, rle_box
from finestsam.records import Record

CATEGORY_ID = 1
# Recall is measured with so many detections of an image, the best first.
LIMITS = (10, 100, 1000)
# IoUs and recalls of the precision-recall curves; the recalls are pycocotools'.
TRACED_IOUS, TRACED_RECALLS = (0.5, 0.75), np.linspace(0, 1, 101)
AREAS = ("all", "small", "medium", "large")  # COCO's, in the order of pycocotools


@dataclass(frozen=True)
class Detections:
    """The masks that were found in one image."""

    rles: Sequence[dict]  # K, compressed, original frame
    scores: Sequence[float]  # K; equal ones keep their order
    classes: Sequence[int] | None = None  # K, counted from 1; None: without classes


class CocoScorer:
    """Compares detections with the objects of their images.

    Raises:
        ValueError: a score is not a number; pycocotools would rank it first.
    """

    def __init__(self, records: Sequence[Record], found: Sequence[Detections]):
        truth = build_truth(records)
        self.has_objects = any(not annotation["iscrowd"] for annotation in truth.dataset["annotations"])
        anonymous = [Detections(detections.rles, detections.scores) for detections in found]
        self._evaluator = _match(truth, build_results(truth, anonymous))

    def score(self) -> dict[str, float]:
        """Return the averages over IoU thresholds 0.5 to 0.95, as defined at cocodataset.org/#detection-eval.

        `ap`, `ap50`, `ap75`, `ap_small` ..., `ar_10`, `ar_100`, `ar_1000`, `ar_1000_small` ...; a size without objects
        has no entry, and a set without objects has none at all. `f1` is the harmonic mean of precision and recall of
        all detections; their scores do not change it.
        """
        if not self.has_objects:
            return {}
        precision, recall = self._tables["precision"], self._tables["recall"]  # T x R x 1 x A x M, T x 1 x A x M
        scores = {
            "ap": _mean(precision[:, :, 0, 0, -1]),
            "ap50": _mean(precision[0, :, 0, 0, -1]),
            "ap75": _mean(precision[5, :, 0, 0, -1]),
        }
        sizes = list(enumerate(AREAS))[1:]
        scores |= {f"ap_{area}": _mean(precision[:, :, 0, index, -1]) for index, area in sizes}
        scores |= {f"ar_{limit}": _mean(recall[:, 0, 0, index]) for index, limit in enumerate(LIMITS)}
        scores |= {f"ar_{LIMITS[-1]}_{area}": _mean(recall[:, 0, index, 2]) for index, area in sizes}
        scores["f1"] = self._measure_f1(range(len(self._counts[0])))
        return {name: value for name, value in scores.items() if value is not None}

    def trace_precision(self) -> dict[float, np.ndarray]:
        """Return by IoU the best precision at each of `TRACED_RECALLS` or a higher recall; nothing without objects.

        The mean of each curve is the average precision at that IoU.
        """
        if not self.has_objects:
            return {}
        indices = [int(np.argmin(np.abs(self._evaluator.params.iouThrs - iou))) for iou in TRACED_IOUS]
        precision = self._tables["precision"][indices, :, 0, 0, -1]
        return dict(zip(TRACED_IOUS, precision, strict=True))

    @cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        with _silence():
            self._evaluator.accumulate()
        return self._evaluator.eval

    @cached_property
    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each image's number of hits (I x T), and of masks plus objects (I x T), without ignored ones."""
        thresholds = len(self._evaluator.params.iouThrs)
        images = self._evaluator.evalImgs[: len(self._evaluator.params.imgIds)]  # entries of the area "all" come first
        hits, entries = (np.zeros((len(images), thresholds), dtype=np.int64) for _ in range(2))
        for index, image in enumerate(images):
            if image is None:
                continue
            is_ignored = np.asarray(image["dtIgnore"], dtype=bool)
            hits[index] = ((image["dtMatches"] > 0) & ~is_ignored).sum(axis=1)
            objects = (~np.asarray(image["gtIgnore"], dtype=bool)).sum()
            entries[index] = (~is_ignored).sum(axis=1) + objects
        return hits, entries

    def _measure_f1(self, indices: Sequence[int]) -> float:
        """Return F1 of some of the images, the mean over IoU thresholds."""
        hits, entries = (counts[indices].sum(axis=0) for counts in self._counts)
        return float(np.mean(2 * hits / np.maximum(entries, 1)))

    def resample(self, indices: Sequence[int]) -> dict[str, float]:
        """Return `ap`, `ar_100`, `ar_1000` and `f1` of a bootstrap sample of the images, which may repeat images."""
        resampled = copy.copy(self._evaluator)
        count = len(indices)
        resampled.params, resampled.eval = copy.deepcopy(self._evaluator.params), {}
        resampled.params.imgIds, resampled.params.areaRng = list(range(count)), resampled.params.areaRng[:1]
        resampled.params.areaRngLbl, resampled.params.maxDets = AREAS[:1], resampled.params.maxDets[1:]
        resampled._paramsEval = resampled.params
        resampled.evalImgs = [self._evaluator.evalImgs[index] for index in indices]
        with _silence():
            resampled.accumulate()
        tables = resampled.eval
        figures = {
            "ap": _mean(tables["precision"][..., -1]),
            "ar_100": _mean(tables["recall"][..., 0]),
            "ar_1000": _mean(tables["recall"][..., 1]),
            "f1": self._measure_f1(indices),
        }
        return {name: value or 0.0 for name, value in figures.items()}


def score_detections(records: Sequence[Record], found: Sequence[Detections]) -> dict[str, float]:
    """Return `CocoScorer`'s figures."""
    return CocoScorer(records, found).score()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep pycocotools from reporting each of its steps."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def run_pycocotools(truth: COCO, results: COCO, category_ids: list[int]) -> COCOeval:
    """Return the evaluation of some categories over objects of all sizes, its tables in `eval`."""
    evaluator = _match(truth, results, category_ids)
    with _silence():
        evaluator.accumulate()
    return evaluator


def _match(truth: COCO, results: COCO, category_ids: list[int] | None = None) -> COCOeval:
    """Let pycocotools match masks and objects of some categories; None: without categories, and for each size."""
    evaluator = COCOeval(truth, results, "segm")
    most = max(map(len, results.imgToAnns.values()), default=0)
    evaluator.params.maxDets = [*LIMITS, max(most, LIMITS[-1] + 1)]
    if category_ids is not None:
        evaluator.params.catIds = category_ids
        evaluator.params.areaRng, evaluator.params.areaRngLbl = evaluator.params.areaRng[:1], AREAS[:1]
    with _silence():
        evaluator.evaluate()
    return evaluator


def build_truth(records: Sequence[Record], classes: Mapping[int, int] | None = None) -> COCO:
    """Return the objects and crowd regions of images, numbered from 1, as pycocotools takes them.

    Args:
        classes: by category id. Objects of other categories are left out; a crowd region without a category counts for
            each class. None: all are of one category.
    """
    numbers = {CATEGORY_ID} if classes is None else set(classes.values())
    images, annotations = [], []
    for image_id, record in enumerate(records, start=1):
        height, width = record.size
        images.append({"id": image_id, "height": height, "width": width})
        parts = [
            (found.counts, 0, CATEGORY_ID if classes is None else classes[found.category_id])
            for found in record.annotations
            if classes is None or found.category_id in classes
        ]
        for counts, category_id in record.list_crowds():
            counts_for_each = classes is None or category_id is None
            found = numbers if counts_for_each else {classes[category_id]} if category_id in classes else set()
            parts += [(counts, 1, number) for number in found]
        for counts, is_crowd, number in parts:
            rle = {"size": [height, width], "counts": counts}
            annotations.append(_describe(len(annotations) + 1, image_id, rle, number) | {"iscrowd": is_crowd})
    return _build_index(images, annotations, sorted(numbers))


def build_results(truth: COCO, found: Sequence[Detections]) -> COCO:
    """Return detections in the images of `truth`, as pycocotools takes them; without classes all have one category."""
    annotations = []
    for image_id, detections in enumerate(found, start=1):
        classes = [CATEGORY_ID] * len(detections.rles) if detections.classes is None else detections.classes
        for rle, score, number in zip(detections.rles, detections.scores, classes, strict=True):
            if not np.isfinite(score):
                raise ValueError(f"a score is {score}")
            described = _describe(len(annotations) + 1, image_id, rle, number)
            annotations.append(described | {"iscrowd": 0, "score": float(score)})
    return _build_index(truth.dataset["images"], annotations, truth.getCatIds())


def _describe(annotation_id: int, image_id: int, rle: dict, category_id: int) -> dict:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": rle,
        "area": rle_area(rle),
        "bbox": rle_box(rle),
    }


def _build_index(images: list[dict], annotations: list[dict], category_ids: list[int]) -> COCO:
    coco = COCO()
    categories = [{"id": number, "name": f"class {number}"} for number in category_ids]
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with _silence():
        coco.createIndex()
    return coco


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of the measured values; pycocotools marks those without a value with -1."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None
