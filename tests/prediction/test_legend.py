import numpy as np
import pytest

from finestsam.masks import encode_mask
from finestsam.prediction.legend import PAPER, draw_legend
from finestsam.prediction.overlay import colour_classes, draw_named_overlay

SIZE = (300, 400)
NAMES = ["ball", "crate", "größer <b>"]


@pytest.fixture
def image() -> np.ndarray:
    return np.full((*SIZE, 3), 90, dtype=np.uint8)


def draw_mask(rows: slice, columns: slice) -> dict:
    mask = np.zeros(SIZE, dtype=bool)
    mask[rows, columns] = True
    return encode_mask(mask)


def test_masks_have_the_colours_of_their_categories(image):
    rles = [draw_mask(slice(20, 100), slice(20, 100)), draw_mask(slice(120, 200), slice(20, 100))]
    rles.append(draw_mask(slice(20, 100), slice(200, 380)))

    drawn = draw_named_overlay(image, rles, np.array([2, 1, 2]), NAMES, opacity=1.0)

    colours = colour_classes(4)
    assert (drawn[60, 60] == colours[2]).all() and (drawn[60, 300] == colours[2]).all()
    assert (drawn[160, 60] == colours[1]).all()


def test_the_legend_lies_where_the_least_is_covered_and_has_what_is_there(image):
    rles = [draw_mask(slice(0, 160), slice(0, 400)), draw_mask(slice(160, 300), slice(0, 160))]

    drawn = draw_named_overlay(image, rles, np.array([1, 3]), NAMES, opacity=0.5)

    is_paper = (drawn == PAPER).all(axis=2)
    rows, columns = np.nonzero(is_paper)
    assert rows.min() > 160 and columns.min() > 160  # the free corner
    plate = drawn[rows.min() :, columns.min() :].reshape(-1, 3).tolist()
    colours = colour_classes(4).tolist()
    assert colours[1] in plate and colours[3] in plate and colours[2] not in plate
    assert (draw_named_overlay(image, [], np.zeros(0, dtype=int), NAMES, 0.5) == image).all()


def test_what_has_no_room_is_left_out_or_counted(image):
    entries = [(f"a very long name of category {number} " * 5, np.array([1, 2, 3], np.uint8)) for number in range(40)]

    drawn = draw_legend(image, entries, np.zeros(SIZE, dtype=bool))

    changed = (drawn != image).any(axis=2)
    assert changed.any(axis=1).sum() <= 0.45 * SIZE[0] and changed.any(axis=0).sum() <= 0.6 * SIZE[1]
    thin = image[:20]
    assert (draw_legend(thin, entries, np.zeros(thin.shape[:2], dtype=bool)) == thin).all()


def test_categories_beyond_the_palette_have_colours_of_their_own():
    assert len({tuple(colour) for colour in colour_classes(64)[1:].tolist()}) == 63
