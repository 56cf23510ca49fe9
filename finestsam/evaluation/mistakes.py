"""What kind of mistakes the generator makes: objects missed, merged and split, masks of nothing, by size."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from finestsam.data.index import Record
from finestsam.data.reach import SIZES, name_size
from finestsam.evaluation.candidates import match, measure_truth
from finestsam.evaluation.coco_scores import Detections
from finestsam.masks import rle_area, rle_overlaps

# A mask finds an object from this IoU on; most of something is more than half of it.
FOUND_IOU, MOST = 0.5, 0.5


@dataclass
class Mistakes:
    """Counts of one size; every object is in one of the first four, every mask that finds none may be spurious."""

    found: int = 0
    merged: int = 0  # most of the object is in a mask that holds most of another one, too
    split: int = 0  # two masks or more lie mostly in it
    missed: int = 0  # none of these
    spurious: int = 0  # masks that lie mostly in no object and in no crowd region; by their own size

    @property
    def objects(self) -> int:
        return self.found + self.merged + self.split + self.missed


def count_mistakes(records: Sequence[Record], found: Sequence[Detections]) -> list[dict[str, Mistakes]]:
    """Return each picture's counts by size."""
    pictures = []
    for record, one in zip(records, found, strict=True):
        pictures.append({size: Mistakes() for size in SIZES})
        _count(record, one, pictures[-1])
    return pictures


def sum_mistakes(pictures: Sequence[dict[str, Mistakes]]) -> dict[str, Mistakes]:
    """Return the counts of all pictures by size, and under `all` their sum."""
    by_size = {size: _sum([picture[size] for picture in pictures]) for size in SIZES}
    return by_size | {"all": _sum(list(by_size.values()))}


def _sum(parts: Sequence[Mistakes]) -> Mistakes:
    return Mistakes(*(sum(getattr(part, entry.name) for part in parts) for entry in fields(Mistakes)))


def _count(record: Record, one: Detections, counts: dict[str, Mistakes]) -> None:
    order = np.argsort(-np.asarray(one.scores, dtype=float), kind="stable")
    rles = [one.rles[place] for place in order]
    truth = [record.rle(annotation) for annotation in record.annotations]
    ious, crowd_shares = measure_truth(rles, record)
    hits = match(ious, np.array([FOUND_IOU]))[0]
    inside = rle_overlaps(rles, truth, over_own_area=True)  # K x G: the share of the mask in the object
    covered = rle_overlaps(truth, rles, over_own_area=True).T  # K x G: the share of the object in the mask
    holds = covered > MOST
    is_merging = holds.sum(axis=1) > 1
    for place, annotation in enumerate(record.annotations):
        count = counts[name_size(annotation.area)]
        if place in hits:
            count.found += 1
        elif (holds[:, place] & is_merging).any():
            count.merged += 1
        elif (inside[:, place] > MOST).sum() > 1:
            count.split += 1
        else:
            count.missed += 1
    for place, rle in enumerate(rles):
        touches = max(inside[place].max(initial=0.0), crowd_shares[place]) > MOST or is_merging[place]
        if hits[place] < 0 and not touches:
            counts[name_size(rle_area(rle))].spurious += 1
