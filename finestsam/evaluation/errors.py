"""What became of every object (found, merged, split, missed) and of every mask (duplicates, fragments, ...)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from finestsam.data.coverage import SIZES, name_size
from finestsam.evaluation.candidates import match, measure_truth
from finestsam.evaluation.coco_scores import Detections
from finestsam.masks import rle_area, rle_overlaps
from finestsam.records import Record

# A mask finds an object from this IoU on; most of something is more than half of it.
FOUND_IOU, MOST = 0.5, 0.5
# What becomes of an object: the first that holds.
OBJECT_KINDS = {
    "found": "a mask of its own has an IoU of 0.5 or more",
    "merged": "most of it is in a mask that holds most of another object, too",
    "split": "two masks or more lie mostly in it",
    "missed": "none of these",
}
# What a mask is: the first that holds.
MASK_KINDS = {
    "finding": "finds an object",
    "duplicate": "its IoU with an object that a better mask finds is 0.5 or more",
    "merging": "holds most of two objects or more",
    "fragment": "lies mostly in an object",
    "in_crowd": "lies mostly in a crowd region, where nothing counts",
    "invented": "none of these",
}


@dataclass
class Mistakes:
    """Counts of one size: of objects and of masks, each of which is of one kind."""

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
        """Return how far the number of masks is from that of objects; those in crowd regions are neither."""
        return abs(self.mask_count - self.masks["in_crowd"] - self.object_count)


def count_mistakes(records: Sequence[Record], found: Sequence[Detections]) -> list[dict[str, Mistakes]]:
    """Return each image's counts by size: of objects by theirs, of masks by their own."""
    images = []
    for record, one in zip(records, found, strict=True):
        images.append({size: Mistakes() for size in SIZES})
        _count(record, one, images[-1])
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


def _count(record: Record, one: Detections, counts: dict[str, Mistakes]) -> None:
    order = np.argsort(-np.asarray(one.scores, dtype=float), kind="stable")
    rles = [one.rles[place] for place in order]
    truth = [record.rle(annotation) for annotation in record.annotations]
    ious, crowd_shares = measure_truth(rles, record)
    hits = match(ious, np.array([FOUND_IOU]))[0]
    inside = rle_overlaps(rles, truth, over_own_area=True)  # K x G: the share of the mask in the object
    holds = rle_overlaps(truth, rles, over_own_area=True).T > MOST  # K x G: most of the object is in the mask
    is_merging = holds.sum(axis=1) > 1
    is_merged = (holds & is_merging[:, None]).any(axis=0)
    is_split = (inside > MOST).sum(axis=0) > 1
    for place, annotation in enumerate(record.annotations):
        holding = {"found": place in hits, "merged": is_merged[place], "split": is_split[place], "missed": True}
        counts[name_size(annotation.area)].objects[_find_first(holding)] += 1
    for place, rle in enumerate(rles):
        holding = {
            "finding": hits[place] >= 0,
            "duplicate": ious[place].max(initial=0.0) >= FOUND_IOU,
            "merging": is_merging[place],
            "fragment": inside[place].max(initial=0.0) > MOST,
            "in_crowd": crowd_shares[place] > MOST,
            "invented": True,
        }
        counts[name_size(rle_area(rle))].masks[_find_first(holding)] += 1


def _find_first(holding: dict[str, bool]) -> str:
    return next(kind for kind, holds in holding.items() if holds)
