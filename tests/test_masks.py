import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from finestsam.errors import Defect
from finestsam.masks import (
    boundary_iou,
    box_to_rle,
    decode_rle,
    decode_rles,
    distance_inside,
    encode_mask,
    find_boundary,
    find_largest_component,
    polygons_to_rle,
    rasterize,
    remove_small_regions,
    rle_area,
    rle_box,
    rle_from_json,
    rle_to_json,
    rle_to_polygons,
    segmentation_to_rle,
    shared_area,
)

SIZE = (10, 12)


def sample_random_mask(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).random(size) > 0.5


@pytest.mark.parametrize("seed", range(20))
def test_every_form_of_run_lengths_gives_the_mask_that_pycocotools_encoded(seed):
    mask = sample_random_mask(seed)
    compressed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    columns = mask.T.flatten()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], columns, [1 - columns[-1]]]))).tolist()
    runs = np.diff([0, *edges]).tolist()

    as_text = segmentation_to_rle({"size": list(SIZE), "counts": compressed["counts"].decode()}, SIZE)
    as_list = segmentation_to_rle({"size": list(SIZE), "counts": runs}, SIZE)

    assert as_text == as_list == compressed
    assert (decode_rle(as_text) == mask).all()


def test_long_runs_with_falling_differences_are_decoded_like_pycocotools(seed=3):
    mask = sample_random_mask(seed, (500, 700))
    mask[100:400, 50:650] = True
    mask[200:210, 300:310] = False
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))

    assert segmentation_to_rle(rle_to_json(rle), (500, 700)) == rle


def render_zigzag(corners: int, width: float, height: float = 1.0) -> list[float]:
    """A polygon whose every edge crosses the image."""
    across = np.arange(corners) % 2 * width
    return np.stack([across, np.linspace(0, height, corners)], axis=1).ravel().tolist()


@pytest.mark.parametrize(
    "parts",
    [
        [render_zigzag(4000, 999)],
        [render_zigzag(40, 99_999)],
        [render_zigzag(200, 999)] * 20,
    ],
    ids=["within the image", "far out", "in many parts"],
)
def test_an_outline_that_runs_to_and_fro_is_refused_before_it_is_followed(parts):
    with pytest.raises(
        Defect, match=r"an outline of [\d.e+]+ pixels in an image of 1000 x 500, expected at most 2000000"
    ):
        segmentation_to_rle(parts, (500, 1000))


def test_the_longest_outline_that_a_mask_can_have_is_read():
    mask = np.zeros((60, 80), dtype=bool)
    mask[::2] = True
    mask[:, 0] = True  # a comb
    rle = encode_mask(mask)

    assert segmentation_to_rle(rle_to_polygons(rle), mask.shape) == rle


def test_a_multi_part_polygon_is_one_object():
    parts = [[1, 1, 4, 1, 4, 4, 1, 4], [7, 5, 10, 5, 10, 8, 7, 8]]

    rle = segmentation_to_rle(parts, SIZE)

    expected = coco_mask.merge(coco_mask.frPyObjects(parts, *SIZE))
    assert rle == expected
    assert rle_area(rle) == 18
    assert rle_box(rle) == [1, 1, 9, 7]


def test_a_flat_list_of_numbers_and_numbers_as_text_are_one_polygon():
    polygon = [1, 1, 4, 1, 4, 4, 1, 4]

    assert segmentation_to_rle(polygon, SIZE) == segmentation_to_rle([polygon], SIZE)
    assert segmentation_to_rle([[str(number) for number in polygon]], SIZE) == segmentation_to_rle([polygon], SIZE)


def test_a_polygon_far_larger_than_the_image_is_clipped_to_it():
    assert rle_area(segmentation_to_rle([[-9000, -9000, 9000, -9000, 9000, 9000, -9000, 9000]], SIZE)) == 120


@pytest.mark.parametrize(
    ("segmentation", "code"),
    [
        ([], "empty_segmentation"),
        ([[]], "empty_segmentation"),
        (None, "empty_segmentation"),
        ([[1, 1, 5, 5]], "too_few_points"),
        ([[1, 1]], "too_few_points"),
        ([[1, 1, 5, 5, 7]], "odd_coordinates"),
        ([[1, 1, 5, float("nan"), 7, 7]], "not_finite"),
        ([[1, 1, 5, float("inf"), 7, 7]], "not_finite"),
        ([[1, 1, 5, 1e12, 7, 7]], "far_outside"),
        ([[1, 1, 5, 2e8, 7, 7]], "far_outside"),
        ([[1, 1, 5, 10**400, 7, 7]], "far_outside"),
        ([["a", 1, 5, 5, 7, 7]], "not_a_number"),
        ([[1, 1, 5, 5, 9, 9]], "empty_mask"),
        ([[20, 20, 30, 20, 30, 30]], "empty_mask"),
        ({"size": [12, 10], "counts": [120]}, "rle_size"),
        ({"counts": [120]}, "rle_size"),
        ({"size": [100000, 100000], "counts": [10**10]}, "rle_size"),
        ({"size": [10, 12], "counts": [60, 50]}, "rle_counts"),
        ({"size": [10, 12], "counts": [60, 70]}, "rle_counts"),
        ({"size": [10, 12], "counts": [70, -10, 60]}, "rle_counts"),
        ({"size": [10, 12], "counts": [10**20, 60, 60]}, "rle_counts"),
        ({"size": [10, 12], "counts": [2**63 - 1, 2**63 - 1, 122]}, "rle_counts"),  # 120 as the sum of int64
        ({"size": [10, 12], "counts": [60.0, 60.0]}, "rle_counts"),
        ({"size": [10, 12], "counts": ""}, "rle_counts"),
        ({"size": [10, 12], "counts": "é~~"}, "rle_counts"),
        ({"size": [10, 12], "counts": "o" * 40}, "rle_counts"),
        ({"size": [10, 12]}, "rle_counts"),
        ({"size": [10, 12], "counts": [120]}, "empty_mask"),
    ],
)
def test_a_segmentation_without_a_mask_is_named_before_pycocotools_sees_it(segmentation, code):
    with pytest.raises(Defect) as caught:
        segmentation_to_rle(segmentation, SIZE)

    assert caught.value.code == code


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_cut_string_of_run_lengths_never_gives_a_mask(cut):
    counts = encode_mask(sample_random_mask(5))["counts"].decode()

    with pytest.raises(Defect, match="run lengths"):
        segmentation_to_rle({"size": list(SIZE), "counts": counts[:-cut]}, SIZE)


def test_masks_come_back_from_run_lengths_and_from_json():
    masks = torch.from_numpy(np.stack([sample_random_mask(seed) for seed in range(3)]))

    rles = [encode_mask(mask.numpy()) for mask in masks]

    assert torch.equal(decode_rles(rles), masks)
    assert [rle_from_json(json.loads(json.dumps(rle_to_json(rle)))) for rle in rles] == rles


def test_the_deepest_pixel_of_an_object_cut_by_the_edge_is_away_from_the_edge():
    distances = distance_inside(np.ones((9, 9), dtype=bool))

    assert np.unravel_index(distances.argmax(), distances.shape) == (4, 4)


def test_a_rasterized_square_covers_its_pixels():
    mask = rasterize(np.array([[2, 3], [6, 3], [6, 7], [2, 7]], dtype=float), SIZE)

    assert mask[3:8, 2:7].all()
    assert mask.sum() == 25


def test_small_holes_are_filled_and_small_islands_dropped_as_segment_anything_does():
    from segment_anything.utils.amg import remove_small_regions as reference

    for seed in range(200):
        rng = np.random.default_rng(seed)
        mask = np.zeros((30, 40), dtype=bool)
        # In the middle, or up to the edges: what surrounds it may then be a small hole itself.
        top, left, bottom, right = rng.integers([0, 0, 14, 14], [14, 14, 31, 41])
        mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) > rng.choice([0.1, 0.45])
        min_area = int(rng.choice([2, 12, 100]))
        expected, _ = reference(mask, min_area, mode="holes")
        expected, _ = reference(expected, min_area, mode="islands")

        assert (remove_small_regions(mask, min_area) == expected).all(), seed


def test_the_largest_island_stays_however_small():
    mask = np.zeros((10, 10), dtype=bool)
    mask[1, 1] = mask[5:7, 5:7] = True

    cleaned = remove_small_regions(mask, 50)

    assert cleaned.sum() == 4
    assert cleaned[5, 5]


def test_boundaries_are_as_thick_as_the_image_needs_and_their_iou_is_that_of_plain_loops():
    rng = np.random.default_rng(0)
    shape = (60, 80)  # 2 % of its diagonal of 100: 2 pixels
    truth = rasterize(np.array([[5.0, 5.0], [60.0, 10.0], [70.0, 50.0], [10.0, 59.0]]), shape)
    mask = np.roll(truth, (2, 3), axis=(0, 1)) & (rng.random(shape) > 0.01)

    def walk(one: np.ndarray) -> np.ndarray:
        framed = np.pad(one, 2)
        near = [framed[2 + dy : 62 + dy, 2 + dx : 82 + dx] for dy in range(-2, 3) for dx in range(-2, 3)]
        return one & ~np.all(near, axis=0)

    np.testing.assert_array_equal(find_boundary(truth, 2), walk(truth))
    one, other = walk(mask), walk(truth)
    assert boundary_iou(mask, truth) == pytest.approx((one & other).sum() / (one | other).sum())
    assert boundary_iou(truth, truth) == 1 and boundary_iou(~truth & False, truth & False) == 1


def test_the_largest_region_comes_with_its_place_and_without_the_others():
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:5, 3:6] = True
    mask[10:14, 20:24] = True
    mask[14, 24] = True  # touches at a corner
    mask[9, 10:15] = True

    region, corner = find_largest_component(mask)

    assert corner == (20, 10)
    assert (region == mask[10:15, 20:25]).all()
    assert find_largest_component(mask & False)[0].size == 0


@pytest.mark.parametrize("seed", range(12))
def test_outlines_filled_are_the_mask_again(seed):
    draw = np.random.default_rng(seed)
    mask = np.zeros((23, 31), dtype=bool)
    for _ in range(draw.integers(1, 5)):
        top, left = draw.integers(0, 22), draw.integers(0, 30)
        mask[top : top + draw.integers(1, 9), left : left + draw.integers(1, 9)] = True
    noise = draw.random(mask.shape) < 0.03
    mask = ndimage_fill(mask | noise)
    rle = encode_mask(mask)

    polygons = rle_to_polygons(rle)

    np.testing.assert_array_equal(decode_rle(polygons_to_rle(polygons, mask.shape)), mask)
    assert all(len(part) >= 6 for part in polygons)
    areas = [rle_area(polygons_to_rle([part], mask.shape)) for part in polygons]
    assert areas[0] >= max(areas) - 1


def ndimage_fill(mask: np.ndarray) -> np.ndarray:
    """Fill what no path of background pixels, side by side, joins with the outside."""
    outside = np.pad(~mask, 1, constant_values=True)
    reached = np.zeros_like(outside)
    reached[0] = True
    while True:
        grown = reached.copy()
        for axis in (0, 1):
            for step in (1, -1):
                grown |= np.roll(reached, step, axis)
        grown &= outside
        if (grown == reached).all():
            return ~reached[1:-1, 1:-1]
        reached = grown


@pytest.mark.parametrize("seed", range(20))
def test_rectangles_and_shared_areas_need_no_pixels(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(2, 40, 2).tolist()
    x, y = int(rng.integers(width)), int(rng.integers(height))
    box = [x, y, int(rng.integers(1, width - x + 1)), int(rng.integers(1, height - y + 1))]
    rectangle = np.zeros((height, width), dtype=bool)
    rectangle[y : y + box[3], x : x + box[2]] = True
    mask = rng.random((height, width)) < 0.5

    rle = box_to_rle(box, (height, width))

    assert (decode_rle(rle) == rectangle).all()
    assert shared_area(encode_mask(mask), rle) == (mask & rectangle).sum()
