"""Which object each cell of the decoder's grid belongs to: what classes of masks are taught from."""

import numpy as np
import torch
from torch import Tensor

from finestsam.data.augment import View, show
from finestsam.masks import decode_rle
from finestsam.records import Annotation, Record

BACKGROUND, PADDING, CROWD = 0, -1, -2
# Along each side of a cell, input frame.
CELL_PIXELS = 4


def label_cells(record: Record, view: View, input_size: tuple[int, int], side: int) -> Tensor:
    """Return the object in the middle of each cell, side x side, int32.

    Objects are numbered from 1 as `sort_by_area` has them; where several overlap, the smallest counts. 0: none. -1: the
    cell lies in the padding. -2: none, and in a crowd region.

    Args:
        input_size: (height, width) of the image in the input frame.
    """
    labels = np.full((side, side), PADDING, dtype=np.int32)
    rows, columns = (find_middles(cells, shown) for cells, shown in zip(input_size, view.size, strict=True))
    inside = np.full((len(rows), len(columns)), BACKGROUND, dtype=np.int32)
    leaves_pixels = view.leaves_pixels(record.size)
    parts = [(CROWD, counts) for counts in record.crowds]
    objects = enumerate(sort_by_area(record.annotations), start=1)
    parts += [(number, one.counts) for number, one in objects if view.meets(one.box)]
    for number, counts in parts:
        mask = decode_rle({"size": list(record.size), "counts": counts})
        if not leaves_pixels:
            mask = show(torch.from_numpy(mask), view).numpy()
        inside[mask[np.ix_(rows, columns)]] = number
    labels[: len(rows), : len(columns)] = inside
    return torch.from_numpy(labels)


def sort_by_area(annotations: list[Annotation]) -> list[Annotation]:
    """Return the objects in the order in which they are drawn, the largest first."""
    return sorted(annotations, key=lambda annotation: annotation.area, reverse=True)


def find_middles(input_length: int, shown_length: int) -> np.ndarray:
    """Return the shown pixels, along one side, in the middles of the cells that hold any of the image."""
    middles = np.arange(0, input_length, CELL_PIXELS) + CELL_PIXELS / 2
    return np.minimum(middles * shown_length / input_length, shown_length - 1).astype(np.int64)
