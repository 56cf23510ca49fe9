"""Label maps: the class of each pixel of an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finestsam.data.augment import View, show
from finestsam.data.cells import find_middles
from finestsam.masks import decode_rle
from finestsam.records import Record

BACKGROUND, IGNORED = 0, -1
BACKGROUND_NAME = "background"


@dataclass(frozen=True)
class ClassTable:
    """The classes of a model, and the class of each category of a dataset.

    Attributes:
        names: by class. Class 0 is the background, or `no object` for classes of masks.
        by_category: class by category id; a missing category is ignored.
        ignores_unlabelled: True: pixels outside all objects are ignored; False: they are background.
    """

    names: list[str]
    by_category: dict[int, int]
    ignores_unlabelled: bool = False


def number_classes(categories: Mapping[int, str], ignores_unlabelled: bool) -> ClassTable:
    """Return a table with the classes 1, 2, ... for the categories (names by id), in the order of their ids."""
    numbers = {category_id: number for number, category_id in enumerate(sorted(categories), start=1)}
    return ClassTable([BACKGROUND_NAME, *(categories[key] for key in numbers)], numbers, ignores_unlabelled)


def match_classes(categories: Mapping[int, str], names: Sequence[str], ignores_unlabelled: bool) -> ClassTable:
    """Return a table with a model's classes, matched to the categories of a dataset by name."""
    numbers = {name: number for number, name in enumerate(names) if number != BACKGROUND}
    known = {category_id: numbers[name] for category_id, name in categories.items() if name in numbers}
    return ClassTable(list(names), known, ignores_unlabelled)


def render_label_map(record: Record, table: ClassTable) -> np.ndarray:
    """Return the class of each pixel, H x W, int16, original frame; `IGNORED` where the class is unknown.

    Where objects overlap, the smallest counts. A crowd region is ignored outside the objects, since it can contain
    other things too.
    """
    unlabelled = IGNORED if table.ignores_unlabelled else BACKGROUND
    labels = np.full(record.size, unlabelled, dtype=np.int16)
    for counts in record.crowds:
        labels[decode_rle({"size": list(record.size), "counts": counts})] = IGNORED
    for annotation in sorted(record.annotations, key=lambda found: found.area, reverse=True):
        labels[decode_rle(record.rle(annotation))] = table.by_category.get(annotation.category_id, IGNORED)
    return labels


def render_label_cells(record: Record, table: ClassTable, view: View, input_size: tuple[int, int], side: int) -> Tensor:
    """Return the class at the centre of each cell of the decoder's grid, side x side, int64; `IGNORED` in the padding.

    Args:
        input_size: (height, width) of the image in the input frame.
    """
    shown = show(torch.from_numpy(render_label_map(record, table)), view)
    rows, columns = (
        torch.from_numpy(find_middles(cells, pixels)) for cells, pixels in zip(input_size, view.size, strict=True)
    )
    labels = torch.full((side, side), IGNORED, dtype=torch.int64)
    labels[: len(rows), : len(columns)] = shown[rows[:, None], columns]
    return labels
