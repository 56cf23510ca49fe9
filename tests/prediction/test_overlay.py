import numpy as np
import pytest

from finestsam.data.synthetic import render_scene
from finestsam.masks import encode_mask, rle_box
from finestsam.prediction.overlay import PALETTE, choose_colours, colour_classes, render_classes, render_overlay


@pytest.fixture
def scene():
    return render_scene(3, 1, (96, 128))


@pytest.fixture
def rles(scene):
    return [encode_mask(mask) for mask in scene.masks]


def square(y, x, side, size=(64, 80)):
    mask = np.zeros(size, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def list_colours(masks):
    return choose_colours(np.array([rle_box(encode_mask(mask)) for mask in masks]))


def test_the_overlay_has_the_image_s_own_size_and_leaves_the_image_alone(scene, rles):
    before = scene.image.copy()

    overlay = render_overlay(scene.image, rles, 0.6)

    assert overlay.shape == scene.image.shape and overlay.dtype == np.uint8
    assert (scene.image == before).all()
    assert (overlay != before).any(axis=2)[np.any(scene.masks, axis=0)].mean() > 0.95


def test_opacity_0_leaves_the_image_as_it_is(scene, rles):
    assert (render_overlay(scene.image, rles, 0.0) == scene.image).all()


@pytest.mark.parametrize("opacity", [0.0, 0.6, 1.0])
def test_an_image_without_masks_comes_back_as_a_copy(scene, opacity):
    overlay = render_overlay(scene.image, [], opacity)

    assert (overlay == scene.image).all() and overlay is not scene.image


def test_opacity_1_hides_the_image_under_solid_colours():
    image = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)

    overlay = render_overlay(image, [encode_mask(square(10, 20, 30))], 1.0)

    inside = overlay[12:38, 22:48].reshape(-1, 3)
    assert len(np.unique(inside, axis=0)) == 1
    assert inside[0].tolist() in PALETTE.tolist()
    assert (overlay[:8] == image[:8]).all()


def test_a_small_mask_is_seen_above_a_large_one_whatever_their_order():
    image = np.zeros((64, 80, 3), np.uint8)
    large, small = encode_mask(square(0, 0, 60)), encode_mask(square(20, 20, 20))

    overlay = render_overlay(image, [small, large], 1.0)

    assert overlay[30, 30].tolist() != overlay[5, 5].tolist()
    assert (overlay == render_overlay(image, [large, small], 1.0)).all()


def test_masks_side_by_side_are_parted_by_a_dark_line():
    image = np.full((64, 80, 3), 255, np.uint8)

    overlay = render_overlay(image, [encode_mask(square(10, 10, 30)), encode_mask(square(10, 40, 30))], 0.6)

    row = overlay[25].sum(axis=1)
    assert row[38:42].min() < 0.6 * min(row[20], row[60])


def test_an_object_keeps_its_colour_when_others_vanish():
    squares = [square(y, x, 12) for y in (2, 22, 42) for x in (2, 22, 42, 62)]

    all_colours, some_colours = list_colours(squares), list_colours(squares[::2])

    assert all_colours[::2].tolist() == some_colours.tolist()
    assert len(set(all_colours.tolist())) > 6


def test_masks_that_touch_have_different_colours(scene):
    nested = [square(side, side, 60 - 2 * side) for side in range(0, 20)]

    assert len(set(list_colours(nested).tolist())) == 20
    assert len(list_colours([square(0, 0, 60)] * 50)) == 50  # more than there are colours


def test_masks_are_painted_into_a_colour_image_made_from_grey():
    grey = np.repeat(np.full((64, 80, 1), 90, np.uint8), 3, axis=2)

    overlay = render_overlay(grey, [encode_mask(square(10, 10, 30))], 0.6)

    assert np.ptp(overlay[25, 25].astype(int)) > 30


def test_the_classes_of_coco_have_a_colour_each():
    colours = colour_classes(85)

    assert (colours[1:22] == PALETTE).all()
    assert len(np.unique(colours[1:], axis=0)) == 84


def test_classes_are_coloured_and_outlined_and_the_background_is_left_alone():
    image = np.full((40, 60, 3), 200, np.uint8)
    classes = np.zeros((40, 60), np.uint8)
    classes[10:30, 10:30], classes[10:30, 40:55] = 1, 25

    drawn = render_classes(image, classes, 0.5)

    colours = colour_classes(26)
    for number, x in ((1, 20), (25, 47)):
        assert np.abs(drawn[20, x].astype(int) - (100 + colours[number] / 2)).max() <= 1
        assert (drawn[10, x] < drawn[20, x]).all()
    assert (drawn[35:] == 200).all() and (drawn[:8] == 200).all()
    assert (render_classes(image, classes, 0.0) == image).all()
