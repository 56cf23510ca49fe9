"""Label maps: which class each pixel of an image belongs to."""

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
    """The classes of a model, and which of them the categories of a dataset are.

    Attributes:
        names: by class; class 0 is the background, or of masks no object.
        by_category: classes by the category ids of the dataset; a category that is missing is ignored.
        ignores_unlabelled: pixels of no object count for nothing; else they are background.
    """

    names: list[str]
    by_category: dict[int, int]
    ignores_unlabelled: bool = False


def number_classes(categories: Mapping[int, str], ignores_unlabelled: bool) -> ClassTable:
    """Give the categories of a dataset, names by id, the classes 1, 2, ... in the order of their ids."""
    numbers = {category_id: number for number, category_id in enumerate(sorted(categories), start=1)}
    return ClassTable([BACKGROUND_NAME, *(categories[key] for key in numbers)], numbers, ignores_unlabelled)


def match_classes(categories: Mapping[int, str], names: Sequence[str], ignores_unlabelled: bool) -> ClassTable:
    """Find the categories of a dataset among the classes of a model, by name."""
    numbers = {name: number for number, name in enumerate(names) if number != BACKGROUND}
    known = {category_id: numbers[name] for category_id, name in categories.items() if name in numbers}
    return ClassTable(list(names), known, ignores_unlabelled)


def render_label_map(record: Record, table: ClassTable) -> np.ndarray:
    """Return the class of each pixel, H x W, int16, original frame; `IGNORED` where nobody can tell.

    Where objects overlap, the smallest counts. A crowd region, which may hold anything else as well, is ignored where
    no object lies on it.
    """
    unlabelled = IGNORED if table.ignores_unlabelled else BACKGROUND
    labels = np.full(record.size, unlabelled, dtype=np.int16)
    for counts in record.crowds:
        labels[decode_rle({"size": list(record.size), "counts": counts})] = IGNORED
    for annotation in sorted(record.annotations, key=lambda one: one.area, reverse=True):
        labels[decode_rle(record.rle(annotation))] = table.by_category.get(annotation.category_id, IGNORED)
    return labels


def render_label_cells(record: Record, table: ClassTable, view: View, input_size: tuple[int, int], side: int) -> Tensor:
    """Return the class in the middle of each cell of the decoder's grid, side x side, int64; `IGNORED` in the padding.

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
