import numpy as np
import pytest

from finestsam.data.prompts import (
    PointCounts,
    build_image_grid,
    coarsen_mask,
    cut_out,
    find_center,
    find_grid_points_inside,
    jitter_box,
    sample_point_sets,
    sample_points,
)
from finestsam.masks import encode_mask, rle_box


def cut(mask: np.ndarray):
    return cut_out(mask, rle_box(encode_mask(mask)))


def render_ring() -> np.ndarray:
    ys, xs = np.mgrid[:100, :120]
    distance = np.hypot(ys - 50, xs - 60)
    return (distance < 40) & (distance > 25)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def is_inside(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    x, y = np.floor(points + 0.5).astype(int).T
    return mask[y, x]


def test_the_centre_of_a_ring_lies_in_its_body():
    mask = render_ring()

    center = find_center(cut(mask))

    assert is_inside(mask, center[None]).all()
    assert abs(np.hypot(center[1] - 50, center[0] - 60) - 32.5) < 2  # in the middle of the body


def test_the_centre_of_a_square_is_its_middle():
    mask = np.zeros((50, 50), dtype=bool)
    mask[10:21, 30:41] = True

    assert find_center(cut(mask)).tolist() == [35, 15]


@pytest.mark.parametrize("seed", range(10))
def test_snapped_points_are_grid_points_inside_the_mask(seed):
    mask = render_ring()
    grid = build_image_grid(32, mask.shape)
    inside = find_grid_points_inside(cut(mask), grid, scale=1.0)

    points, labels = sample_points(cut(mask), PointCounts(5, 0, False, inside), generator(seed))

    assert (labels == 1).all()
    assert is_inside(mask, points).all()
    assert all((grid == point).all(axis=1).any() for point in points)
    assert len(np.unique(points, axis=0)) == 5


def test_a_snapped_centre_is_the_nearest_grid_point_inside():
    mask = render_ring()
    inside = find_grid_points_inside(cut(mask), build_image_grid(32, mask.shape), scale=1.0)

    points, _ = sample_points(cut(mask), PointCounts(1, 0, True, inside), generator())

    distances = np.linalg.norm(inside - find_center(cut(mask)), axis=1)
    assert (points[0] == inside[distances.argmin()]).all()


def test_an_object_between_grid_points_is_requested_at_its_centre_and_padded():
    mask = np.zeros((320, 320), dtype=bool)
    mask[7:10, 8:11] = True  # grid points of 32 a side lie at 5, 15, ...
    inside = find_grid_points_inside(cut(mask), build_image_grid(32, mask.shape), scale=1.0)
    assert len(inside) == 0

    points, labels = sample_points(cut(mask), PointCounts(3, 0, False, inside), generator())

    assert points[0].tolist() == [9, 8]
    assert labels.tolist() == [1, -1, -1]


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_half_pixel_that_sam_adds_decides_which_pixel_a_grid_point_means(scale):
    """At scale 1 a coordinate of 7.8 means the middle of pixel 8; enlarged 4 times the half pixel hardly counts."""
    mask = np.zeros((100, 100), dtype=bool)
    mask[:, 8] = True
    grid = np.array([[7.8, 50.0]], dtype=np.float32)

    is_found = len(find_grid_points_inside(cut(mask), grid, scale)) == 1

    assert is_found == (np.floor(7.8 + 0.5 / scale) == 8)


@pytest.mark.parametrize(("positive", "wanted", "expected"), [(1, 4, 4), (3, 4, 4), (1, 1000, None), (1, 1, 1)])
def test_prompts_of_one_object_share_no_grid_point_and_end_with_them(positive, wanted, expected):
    mask = render_ring()
    inside = find_grid_points_inside(cut(mask), build_image_grid(32, mask.shape), scale=1.0)
    counts = PointCounts(positive, 0, False, inside)

    points, labels = sample_point_sets(cut(mask), counts, wanted, generator())

    assert points.shape == (expected or len(inside), positive, 2)
    assert (labels == 1).all()
    assert len(np.unique(points.reshape(-1, 2), axis=0)) == points.shape[0] * positive
    assert is_inside(mask, points.reshape(-1, 2)).all()
    first, _ = sample_points(cut(mask), counts, generator())
    assert (points[0] == first).all()  # further prompts change nothing about the first


def test_an_object_between_grid_points_has_one_prompt_and_off_the_grid_as_many_as_wanted():
    mask = np.zeros((320, 320), dtype=bool)
    mask[7:10, 8:11] = True
    between = find_grid_points_inside(cut(mask), build_image_grid(32, mask.shape), scale=1.0)

    once, _ = sample_point_sets(cut(mask), PointCounts(1, 1, False, between), 5, generator())
    often, labels = sample_point_sets(cut(mask), PointCounts(1, 1, False, None), 5, generator())

    assert once.shape == (1, 2, 2) and once[0, 0].tolist() == [9, 8]
    assert often.shape == (5, 2, 2) and (labels == [1, 0]).all()


def test_negative_points_lie_in_the_box_outside_the_mask():
    mask = render_ring()

    points, labels = sample_points(cut(mask), PointCounts(1, 20, False, None), generator())

    assert labels.tolist() == [1] + [0] * 20
    negatives = points[1:]
    assert not is_inside(mask, negatives).any()
    x, y, width, height = rle_box(encode_mask(mask))
    assert (negatives >= (x, y)).all()
    assert (negatives < (x + width, y + height)).all()


def test_an_object_that_fills_its_box_gets_negative_points_around_it():
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 30:50] = True

    points, labels = sample_points(cut(mask), PointCounts(0, 200, False, None), generator())

    assert (labels == 0).all()
    assert not is_inside(mask, points).any()
    assert (points >= 0).all()
    assert (points < (60, 40)).all()
    assert (points[:, 0] < 30).any()
    assert (points[:, 0] >= 50).any()
    assert (points[:, 1] < 10).any()
    assert (points[:, 1] >= 20).any()


def test_an_object_that_fills_the_image_has_no_negative_point():
    mask = np.ones((20, 30), dtype=bool)

    _, labels = sample_points(cut(mask), PointCounts(1, 3, False, None), generator())

    assert labels.tolist() == [1, -1, -1, -1]


def test_an_object_of_one_pixel_can_be_requested_three_points():
    mask = np.zeros((20, 30), dtype=bool)
    mask[4, 7] = True

    points, labels = sample_points(cut(mask), PointCounts(3, 1, True, None), generator())

    assert points[:3].tolist() == [[7, 4]] * 3
    assert labels.tolist() == [1, 1, 1, 0]


def test_a_box_moves_by_a_tenth_of_its_side_and_stays_in_the_image():
    box = np.array([100.0, 50.0, 200.0, 90.0])
    noise = np.stack([jitter_box(box, (400, 400), generator(seed)) - box for seed in range(2000)])

    np.testing.assert_allclose(noise.std(axis=0), [10, 4, 10, 4], rtol=0.1)
    assert np.abs(noise).max() <= 20
    wide = np.array([0.0, 0.0, 400.0, 400.0])
    moved = np.stack([jitter_box(wide, (400, 400), generator(seed)) for seed in range(200)])
    assert moved.min() >= 0
    assert moved.max() <= 400
    assert np.abs(moved - wide).max() == 20


def test_a_mask_prompt_is_a_poor_likeness_of_the_truth():
    mask = render_ring()

    ious = []
    for seed in range(50):
        logits = coarsen_mask(mask, (100, 120), generator(seed))
        guess = logits > 0
        ious.append((guess & mask).sum() / (guess | mask).sum())
        assert np.abs(logits).max() <= 6.0

    assert 0.3 < np.mean(ious) < 0.9
    assert max(ious) < 0.98


def test_a_tiny_object_does_not_vanish_from_its_mask_prompt():
    mask = np.zeros((1000, 1000), dtype=bool)
    mask[500:503, 500:503] = True

    assert (coarsen_mask(mask, (64, 64), generator()) > 0).any()


def test_prompts_are_a_pure_function_of_mask_and_seed():
    mask = render_ring()
    counts = PointCounts(4, 4, False, None)

    first, again, other = (sample_points(cut(mask), counts, generator(seed))[0] for seed in (1, 1, 2))

    assert (first == again).all()
    assert (first != other).any()
