import numpy as np
import pytest

from finestsam.masks import encode_mask
from finestsam.prediction.overlay import PAPER, add_legend, colour_classes, render_named_overlay, render_overlay

SIZE = (300, 400)
NAMES = ["ball", "crate", "größer <b>"]


@pytest.fixture
def image() -> np.ndarray:
    return np.full((*SIZE, 3), 90, dtype=np.uint8)


def sample_mask(rows: slice, columns: slice) -> dict:
    mask = np.zeros(SIZE, dtype=bool)
    mask[rows, columns] = True
    return encode_mask(mask)


def test_masks_have_the_colours_of_their_categories(image):
    rles = [sample_mask(slice(20, 100), slice(20, 100)), sample_mask(slice(120, 200), slice(20, 100))]
    rles.append(sample_mask(slice(20, 100), slice(200, 380)))

    drawn = render_named_overlay(image, rles, np.array([2, 1, 2]), NAMES, opacity=1.0)

    colours = colour_classes(4)
    assert (drawn[60, 60] == colours[2]).all() and (drawn[60, 300] == colours[2]).all()
    assert (drawn[160, 60] == colours[1]).all()


@pytest.mark.parametrize("size", [(300, 400), (40, 60), (500, 30), (20, 900)])
def test_the_legend_hides_nothing_and_has_what_is_there(size):
    image = np.full((*size, 3), 90, dtype=np.uint8)
    mask = encode_mask(np.ones(size, dtype=bool))
    rles, classes = [mask, mask], np.array([1, 3])

    drawn = render_named_overlay(image, rles, classes, NAMES, opacity=0.5)

    colours = colour_classes(4)
    plain = render_overlay(image, rles, 0.5, colours[classes])
    assert (drawn[: size[0], : size[1]] == plain).all() and len(drawn) > size[0]
    strip = drawn[size[0] :].reshape(-1, 3).tolist()
    for number in (1, 3):
        assert colours[number].tolist() in strip
    assert colours[2].tolist() not in strip and list(PAPER) in strip


def test_without_masks_there_is_no_legend(image):
    assert (render_named_overlay(image, [], np.zeros(0, dtype=int), NAMES, 0.5) == image).all()


@pytest.mark.parametrize("size", [(300, 400), (20, 30), (900, 100)])
def test_what_has_no_room_is_cut_or_counted(size):
    image = np.full((*size, 3), 90, dtype=np.uint8)
    colours = np.random.default_rng(0).integers(0, 200, (40, 3), dtype=np.uint8)
    entries = [(f"a very long name of category {number} " * 5, colour) for number, colour in enumerate(colours)]

    drawn = add_legend(image, entries)

    letters = max(round(max(size) / 50), 11)
    assert len(drawn) - size[0] <= 7.5 * letters and drawn.shape[1] == max(size[1], 16 * letters)
    strip = drawn[size[0] :].reshape(-1, 3).tolist()
    assert colours[0].tolist() in strip and colours[-1].tolist() not in strip


def test_categories_beyond_the_palette_have_colours_of_their_own():
    assert len({tuple(colour) for colour in colour_classes(64)[1:].tolist()}) == 63
