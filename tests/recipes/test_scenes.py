"""What the built-in weights were trained on."""

from functools import partial

import numpy as np
import pytest
from scene_laws import check_masks, check_seed_and_index_decide, check_sizes_differ

from finestsam.data.synthetic import MIN_AREA_FRACTION, MIN_AREA_PIXELS, Scene
from finestsam.data.synthetic import render_scene as render_scene_of_kind
from finestsam.masks import find_components
from recipes.builtin_weights.make import STAGES
from recipes.builtin_weights.scenes import KINDS

OWN_KINDS = [kind for kind in KINDS if kind not in ("shapes", "facades")]  # the others are tested with the package
EVERY_KIND = pytest.mark.parametrize("kind", OWN_KINDS)
SMALL_KINDS = ("pebbles", "grains")
KINDS_WITH_PARTS = ("things", "scenery")


def render_scene(seed: int, index: int, size: tuple[int, int] = (256, 256), kind: str = "") -> Scene:
    return render_scene_of_kind(seed, index, size, KINDS[kind])


@EVERY_KIND
def test_a_scene_is_a_function_of_its_seed_and_index(kind):
    check_seed_and_index_decide(partial(render_scene, kind=kind))


@EVERY_KIND
@pytest.mark.parametrize("size", [(64, 64), (256, 256), (180, 260)])
def test_masks_are_bool_large_enough_to_see_and_disjoint_within_their_level(kind, size):
    check_masks(partial(render_scene, kind=kind), size, most_levels=2 if kind in KINDS_WITH_PARTS else 1)


@pytest.mark.parametrize("kind", [kind for kind in OWN_KINDS if kind not in (*SMALL_KINDS, "scenery")])
def test_every_kind_draws_objects_of_many_sizes(kind):
    check_sizes_differ(partial(render_scene, kind=kind))


def test_every_kind_but_what_the_demo_teaches_is_in_a_stage():
    assert {kind for stage in STAGES for kind in stage.scenes.kinds} == set(KINDS) - {"facades"}


@pytest.mark.parametrize(("kind", "larger"), [("pebbles", "shapes"), ("grains", "blobs")])
def test_some_kinds_draw_the_same_smaller(kind, larger):
    small, large = (
        [mask.mean() for index in range(6) for mask in render_scene(1, index, (256, 256), name).masks]
        for name in (kind, larger)
    )

    assert np.median(small) < np.median(large) / 2


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_small_things_have_masks_where_the_image_has_the_pixels(kind):
    scenes = [render_scene(1, index, (512, 512), kind) for index in range(12)]

    assert all(len(scene.masks) >= 5 for scene in scenes)
    smallest = min(mask.sum() for scene in scenes for mask in scene.masks)
    assert MIN_AREA_PIXELS <= smallest < MIN_AREA_FRACTION * 512 * 512 / 2


def test_quarters_are_areas_that_lines_enclose_some_with_holes():
    masks = [mask for index in range(6) for mask in render_scene(0, index, (256, 256), "quarters").masks]

    assert all(find_components(mask)[0] == 1 for mask in masks)
    assert any(find_components(~np.pad(mask, 1))[0] > 2 for mask in masks)


def test_parcels_are_outlined_in_dark_ink():
    for index in range(5):
        scene = render_scene(0, index, kind="parcels")
        parcels = np.any(scene.masks, axis=0)
        rim = np.zeros_like(parcels)
        rim[:, 1:] |= parcels[:, :-1]
        rim[:, :-1] |= parcels[:, 1:]
        rim &= ~parcels

        assert scene.image[rim].mean() < 0.8 * scene.image[parcels].mean()


def test_neighbouring_parcels_are_never_joined():
    scene = render_scene(0, 0, kind="parcels")
    labels = sum(number * mask for number, mask in enumerate(scene.masks, start=1))

    left, right = labels[:, :-1], labels[:, 1:]
    assert not ((left != right) & (left > 0) & (right > 0)).any()


@pytest.mark.parametrize("kind", KINDS_WITH_PARTS)
def test_parts_lie_inside_whole_ones(kind):
    masks = np.stack(render_scene(0, 2, kind=kind).masks)
    is_shared = masks.sum(axis=0) == 2

    assert is_shared.any()
    parts = [mask for mask in masks if is_shared[mask].all()]
    assert parts and all(any((whole | part == whole).all() for whole in masks if whole is not part) for part in parts)


def test_scenery_has_few_bodies_that_fill_much_of_the_image_or_many_small_ones():
    counts, largest = [], []
    for index in range(30):
        masks = render_scene(1, index, (128, 128), "scenery").masks
        counts.append(len(masks))
        largest.append(max(mask.mean() for mask in masks))

    assert min(counts) <= 3 and max(counts) >= 20
    assert min(largest) < 0.05 and 0.15 < max(largest) < 0.7


def test_the_ground_of_scenery_has_no_mask():
    """A body is distinguished from what it stands on, however much that is like a thing."""
    covered = [np.any(render_scene(1, index, (128, 128), "scenery").masks, axis=0) for index in range(30)]

    assert 0.05 < np.mean(covered) < 0.5
    assert all(not mask[0].all() for mask in covered)


def test_blobs_touch_each_other():
    scene = render_scene(0, 0, kind="blobs")
    labels = sum(number * mask for number, mask in enumerate(scene.masks, start=1))

    left, right = labels[:, :-1], labels[:, 1:]
    assert ((left != right) & (left > 0) & (right > 0)).any()


@EVERY_KIND
def test_objects_differ_from_what_surrounds_them(kind):
    """A mask that is shifted against the image would have its edges where the image is smooth."""
    on_edges, elsewhere = [], []
    for index in range(8):
        scene = render_scene(2, index, kind=kind)
        labels = sum(number * mask for number, mask in enumerate(scene.masks, start=1))
        steps = np.abs(np.diff(scene.image.astype(float), axis=1)).mean(axis=2)
        is_edge = np.diff(labels, axis=1) != 0
        on_edges.append(steps[is_edge].mean())
        elsewhere.append(steps[~is_edge].mean())

    assert np.mean(on_edges) > 1.5 * np.mean(elsewhere)
