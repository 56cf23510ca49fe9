"""Measure which objects the generator can find: without a grid point inside, an object is never prompted for."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from finestsam.config import GeneratorConfig
from finestsam.images.frames import build_crop_boxes, build_point_grid
from finestsam.masks import find_runs
from finestsam.records import Record
from finestsam.runtime.processes import map_in_processes

# COCO's object sizes: areas in pixels of the original frame, from pycocotools' cocoeval.py.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}


@dataclass(frozen=True)
class Grid:
    """The generator's grid of points on the whole image, and on the crops of each further layer."""

    points_per_side: int
    crop_layers: int = 0

    @property
    def name(self) -> str:
        return f"{self.points_per_side}" + (f" and {self.crop_layers} crop layer" if self.crop_layers else "")


GRIDS = (Grid(16), Grid(32), Grid(64), Grid(32, crop_layers=1))


def measure_reach(records: list[Record]) -> dict[str, dict[str, float]]:
    """Return for each grid the share of objects with a point inside, for all objects and by COCO size.

    This share is the upper limit of recall. Sizes without objects are left out.
    """
    groups = ("all", *SIZES)
    counts, hits = np.zeros(len(groups), dtype=int), np.zeros((len(GRIDS), len(groups)), dtype=int)
    for record, found in zip(records, map_in_processes(find_hits, records, "measuring reach"), strict=True):
        sizes = [name_size(annotation.area) for annotation in record.annotations]
        members = np.array([[name in ("all", size) for name in groups] for size in sizes], dtype=int)
        members = members.reshape(-1, len(groups))  # 0 x groups for an image without objects
        counts += members.sum(axis=0)
        hits += found.T.astype(int) @ members
    shares = hits / np.maximum(counts, 1)
    return {
        grid.name: {name: float(share) for name, share, count in zip(groups, row, counts, strict=True) if count}
        for grid, row in zip(GRIDS, shares, strict=True)
    }


def find_hits(record: Record) -> np.ndarray:
    """Return whether each object has a point of each grid inside, objects x GRIDS, bool."""
    grids = [_list_grid_pixels(grid, record.size) for grid in GRIDS]
    hits = np.zeros((len(record.annotations), len(GRIDS)), dtype=bool)
    for row, annotation in enumerate(record.annotations):
        starts, ends = find_runs(record.rle(annotation))
        for column, pixels in enumerate(grids):
            hits[row, column] = (np.searchsorted(pixels, ends) > np.searchsorted(pixels, starts)).any()
    return hits


def name_size(area: int) -> str:
    """Return COCO's size name for an object of `area` pixels."""
    return next(name for name, (low, high) in SIZES.items() if low <= area < high)


@lru_cache(maxsize=64)
def _list_grid_pixels(grid: Grid, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels of a grid's points, as sorted indices into a column-major image."""
    points = np.concatenate(
        [corner + build_point_grid(grid.points_per_side) * side for corner, side in _list_crops(grid, size)]
    )
    pixels = np.minimum(points.astype(np.int64), (size[1] - 1, size[0] - 1))  # XY
    return np.unique(pixels[:, 0] * size[0] + pixels[:, 1])


def _list_crops(grid: Grid, size: tuple[int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the corner (XY) and the size (width, height) of the image and of each crop."""
    for x0, y0, x1, y1 in build_crop_boxes(size, grid.crop_layers, GeneratorConfig.crop_overlap_ratio):
        yield np.array([x0, y0]), np.array([x1 - x0, y1 - y0])
