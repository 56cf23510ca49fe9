"""What the generator can find at all: an object without a point of the grid inside is never asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from finestsam.config import GeneratorConfig
from finestsam.data.index import Record
from finestsam.images import build_crop_boxes, build_point_grid
from finestsam.masks import find_pixels_inside

# COCO's names for the sizes of objects: areas in pixels of the original frame, as in pycocotools' cocoeval.py.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}


@dataclass(frozen=True)
class Grid:
    """Points that the generator asks at: of the whole picture, and of the crops of each further layer."""

    points_per_side: int
    crop_layers: int = 0

    @property
    def name(self) -> str:
        return f"{self.points_per_side}" + (f" and {self.crop_layers} crop layer" if self.crop_layers else "")


GRIDS = (Grid(16), Grid(32), Grid(64), Grid(32, crop_layers=1))


def measure_reach(records: list[Record]) -> dict[str, dict[str, float]]:
    """Return for each grid the share of objects with a point inside, of all and by COCO size: the ceiling of recall.

    Sizes without objects are left out.
    """
    hits = {grid: dict.fromkeys(("all", *SIZES), 0) for grid in GRIDS}
    counts = dict.fromkeys(("all", *SIZES), 0)
    pixels: dict[tuple[Grid, tuple[int, int]], np.ndarray] = {}
    for record in records:
        for annotation in record.annotations:
            groups = ("all", name_size(annotation.area))
            for group in groups:
                counts[group] += 1
            for grid in GRIDS:
                key = (grid, record.size)
                if key not in pixels:
                    pixels[key] = list_grid_pixels(grid, record.size)
                is_hit = _has_pixel_inside(record.rle(annotation), annotation.box, pixels[key])
                for group in groups:
                    hits[grid][group] += is_hit
    return {grid.name: {group: hits[grid][group] / count for group, count in counts.items() if count} for grid in GRIDS}


def name_size(area: int) -> str:
    """Return COCO's name for the size of an object of this many pixels."""
    return next(name for name, (low, high) in SIZES.items() if low <= area < high)


def list_grid_pixels(grid: Grid, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels that the points of a grid fall into, K x 2, int, XY, of a picture of (height, width)."""
    points = np.concatenate(
        [corner + build_point_grid(grid.points_per_side) * side for corner, side in _list_crops(grid, size)]
    )
    return np.minimum(points.astype(np.int64), (size[1] - 1, size[0] - 1))


def _list_crops(grid: Grid, size: tuple[int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the corner and the width and height, XY, of the picture and its crops."""
    for x0, y0, x1, y1 in build_crop_boxes(size, grid.crop_layers, GeneratorConfig.crop_overlap_ratio):
        yield np.array([x0, y0]), np.array([x1 - x0, y1 - y0])


def _has_pixel_inside(rle: dict, box: list[int], pixels: np.ndarray) -> bool:
    x, y, width, height = box
    near = pixels[((pixels >= (x, y)) & (pixels < (x + width, y + height))).all(axis=1)]
    return len(near) > 0 and bool(find_pixels_inside(rle, near).any())
