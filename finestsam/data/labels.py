"""Find signs in the annotations that every object of an image is annotated (complete labels), or not (partial)."""

from collections.abc import Sequence

import numpy as np

from finestsam.masks import join_rles, rle_area
from finestsam.records import Record

# If the median is at least MANY_OBJECTS, fewer objects than FEW_SHARE of it are a sign of partial labels.
FEW_SHARE, MANY_OBJECTS = 0.25, 8
# If annotations cover this share of an image, little room is left for objects that are not annotated.
LARGE_COVER = 0.5


def describe_labels(records: Sequence[Record], labels: str) -> list[str]:
    """Return two lines: the kind of labels that is assumed, and the signs of the other kind in the annotations.

    Args:
        labels: dataset.labels, "complete" or "partial".
    """
    other = {"complete": "partial", "partial": "complete"}[labels]
    meaning = {"complete": "every object of an image is annotated", "partial": "some objects are not annotated"}
    signs = (_find_signs_of_partial if other == "partial" else _find_signs_of_complete)(records)
    line = f"labels: {labels} is assumed, {meaning[labels]}; --dataset.labels {other} changes it"
    return [line, f"  signs of {other} labels: {', '.join(signs) if signs else 'none'}"]


def _find_signs_of_partial(records: Sequence[Record]) -> list[str]:
    counts = np.array([len(record.annotations) for record in records])
    median = float(np.median(counts)) if len(counts) else 0.0
    empty, crowds = int((counts == 0).sum()), sum(len(record.crowds) for record in records)
    few = int(((counts > 0) & (counts < FEW_SHARE * median)).sum()) if median >= MANY_OBJECTS else 0
    signs = []
    if empty:
        signs.append(f"{empty} of {len(records)} images have no annotation")
    if few:
        signs.append(f"{few} images have fewer than a quarter of the median of {median:g} objects")
    if crowds:
        signs.append(f"objects in {crowds} crowd regions are not annotated one by one")
    return signs


def _find_signs_of_complete(records: Sequence[Record]) -> list[str]:
    counts = np.array([len(record.annotations) for record in records])
    signs = []
    if len(counts) and counts.min() > 0:
        signs.append("every image has annotations")
    cover = float(np.median([_measure_cover(record) for record in records])) if records else 0.0
    if cover >= LARGE_COVER:
        signs.append(f"annotations cover {cover:.0%} of an image (median)")
    return signs


def _measure_cover(record: Record) -> float:
    """Return the share of an image's pixels inside annotated objects."""
    if not record.annotations:
        return 0.0
    joined = join_rles([record.rle(annotation) for annotation in record.annotations])
    return rle_area(joined) / (record.size[0] * record.size[1])
