from pathlib import Path

import numpy as np
import pytest

from finestsam.data.coverage import GRIDS, find_hits, measure_reach
from finestsam.images.frames import build_crop_boxes, build_point_grid
from finestsam.masks import encode_mask, rle_area, rle_box
from finestsam.records import Annotation, Record


def make_record(masks: list[np.ndarray]) -> Record:
    rles = [encode_mask(mask) for mask in masks]
    annotations = [Annotation(i, 1, rle["counts"], rle_area(rle), rle_box(rle)) for i, rle in enumerate(rles)]
    return Record(1, "a.png", Path("a.png"), masks[0].shape, annotations)


def render_rectangle(size: tuple[int, int], x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


@pytest.mark.parametrize("size", [(90, 160), (33, 20), (7, 300)])
def test_hits_are_those_of_every_point_looked_up_in_every_mask(size):
    generator = np.random.default_rng(0)
    masks = [generator.random(size) > share for share in (0.5, 0.99, 0.999, 0.9999)]
    masks += [render_rectangle(size, *generator.integers(0, 7, 4)) for _ in range(20)]
    masks = [mask for mask in masks if mask.any()]

    hits = find_hits(make_record(masks))

    for column, grid in enumerate(GRIDS):
        expected = np.zeros(len(masks), dtype=bool)
        for x0, y0, x1, y1 in build_crop_boxes(size, grid.crop_layers, 512 / 1500):
            points = build_point_grid(grid.points_per_side) * (x1 - x0, y1 - y0) + (x0, y0)
            for x, y in np.minimum(points.astype(int), (size[1] - 1, size[0] - 1)):
                expected |= np.array([mask[y, x] for mask in masks])
        assert (hits[:, column] == expected).all(), grid


def test_shares_are_reported_by_size():
    size = (320, 320)  # a point of 16 x 16 every 20 pixels, from 10
    on_a_point, between_points = render_rectangle(size, 5, 5, 10, 10), render_rectangle(size, 12, 12, 10, 10)
    large = render_rectangle(size, 40, 40, 200, 200)

    background = Record(2, "b.png", Path("b.png"), size, [])

    reach = measure_reach([make_record([on_a_point, between_points]), background, make_record([large])])

    assert reach["16"] == {"all": 2 / 3, "small": 0.5, "large": 1.0}


def test_no_objects_have_no_shares():
    assert measure_reach([]) == {grid.name: {} for grid in GRIDS}
