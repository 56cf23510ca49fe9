"""Classify each object (found, merged, split, missed) and each mask (finding, duplicate, fragment, ...)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from finestsam.data.coverage import SIZES, name_size
from finestsam.evaluation.candidates import match, measure_truth
from finestsam.evaluation.coco_scores import Detections
from finestsam.masks import rle_area, rle_overlaps
from finestsam.records import Record

# The smallest IoU at which a mask finds an object, and the share above which an area counts as most of another.
FOUND_IOU, MOST = 0.5, 0.5
# An object has the first kind that applies.
OBJECT_KINDS = {
    "found": "it is matched with a mask at an IoU of 0.5 or more",
    "merged": "one mask covers more than half of it and more than half of another object",
    "split": "two or more masks lie mostly inside it",
    "missed": "none of these",
}
# A mask has the first kind that applies.
MASK_KINDS = {
    "finding": "it is matched with an object at an IoU of 0.5 or more",
    "duplicate": "its IoU with an object is 0.5 or more, but a better mask finds that object",
    "merging": "it covers more than half of two or more objects",
    "fragment": "it lies mostly inside an object",
    "in_crowd": "it lies mostly inside a crowd region, where masks do not count",
    "invented": "none of these",
}


@dataclass
class Mistakes:
    """Numbers of objects and of masks of one size, by kind."""

    objects: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OBJECT_KINDS, 0))
    masks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MASK_KINDS, 0))

    @property
    def object_count(self) -> int:
        return sum(self.objects.values())

    @property
    def mask_count(self) -> int:
        return sum(self.masks.values())

    @property
    def counting_error(self) -> int:
        """Return the absolute difference of the numbers of masks and of objects, without masks in crowd regions."""
        return abs(self.mask_count - self.masks["in_crowd"] - self.object_count)


def count_mistakes(records: Sequence[Record], found: Sequence[Detections]) -> list[dict[str, Mistakes]]:
    """Return each image's counts by size; objects and masks are counted by their own size."""
    images = []
    for record, detections in zip(records, found, strict=True):
        images.append({size: Mistakes() for size in SIZES})
        _count(record, detections, images[-1])
    return images


def sum_mistakes(images: Sequence[dict[str, Mistakes]]) -> dict[str, Mistakes]:
    """Return the counts of all images by size, and under `all` their sum."""
    by_size = {size: _sum([image[size] for image in images]) for size in SIZES}
    return by_size | {"all": _sum(list(by_size.values()))}


def _sum(parts: Sequence[Mistakes]) -> Mistakes:
    return Mistakes(
        {kind: sum(part.objects[kind] for part in parts) for kind in OBJECT_KINDS},
        {kind: sum(part.masks[kind] for part in parts) for kind in MASK_KINDS},
    )


def _count(record: Record, detections: Detections, counts: dict[str, Mistakes]) -> None:
    order = np.argsort(-np.asarray(detections.scores, dtype=float), kind="stable")
    rles = [detections.rles[index] for index in order]
    truth = [record.rle(annotation) for annotation in record.annotations]
    ious, crowd_shares = measure_truth(rles, record)
    hits = match(ious, np.array([FOUND_IOU]))[0]
    inside = rle_overlaps(rles, truth, over_own_area=True)  # K x G: the share of the mask in the object
    covers = rle_overlaps(truth, rles, over_own_area=True).T > MOST  # K x G: most of the object is in the mask
    is_merging = covers.sum(axis=1) > 1
    is_merged = (covers & is_merging[:, None]).any(axis=0)
    is_split = (inside > MOST).sum(axis=0) > 1
    for index, annotation in enumerate(record.annotations):
        kinds = {"found": index in hits, "merged": is_merged[index], "split": is_split[index], "missed": True}
        counts[name_size(annotation.area)].objects[_find_first(kinds)] += 1
    for index, rle in enumerate(rles):
        kinds = {
            "finding": hits[index] >= 0,
            "duplicate": ious[index].max(initial=0.0) >= FOUND_IOU,
            "merging": is_merging[index],
            "fragment": inside[index].max(initial=0.0) > MOST,
            "in_crowd": crowd_shares[index] > MOST,
            "invented": True,
        }
        counts[name_size(rle_area(rle))].masks[_find_first(kinds)] += 1


def _find_first(kinds: dict[str, bool]) -> str:
    return next(kind for kind, applies in kinds.items() if applies)
