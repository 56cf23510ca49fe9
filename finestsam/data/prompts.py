"""Sample the prompts of one object from its mask: points, box, coarse mask.

All functions are pure functions of the mask and the random generator. Points are pixels of the original frame; the
dataset scales them to the input frame.
"""

from dataclasses import dataclass, replace

import numpy as np

from finestsam.images.frames import blur, build_point_grid, shrink_mask
from finestsam.masks import distance_inside

POSITIVE, NEGATIVE, MISSING = 1, 0, -1
# Typical magnitude of SAM's logits inside an object. The decoder was trained with mask prompts of this magnitude.
MASK_LOGIT = 6.0
# The noise on a box, as in the SAM paper (arXiv 2304.02643, appendix A): its standard deviation as a share of the box's
# side, and the largest, in pixels of the input frame.
BOX_JITTER_RATIO, BOX_JITTER_MAX_PIXELS = 0.1, 20.0


@dataclass(frozen=True)
class ObjectMask:
    """The mask of one object, cropped to its box. Prompts are sampled from these pixels."""

    mask: np.ndarray  # h x w, bool, the pixels in the box
    corner: tuple[int, int]  # (x, y) of the box in the image
    image_size: tuple[int, int]


@dataclass(frozen=True)
class PointCounts:
    """How many points `sample_points` returns, and which."""

    positive: int
    negative: int
    use_center: bool
    grid: np.ndarray | None  # K x 2, XY, original frame: positive points are some of these; None: any pixel


def cut_out(mask: np.ndarray, box: list[int]) -> ObjectMask:
    """Crop a mask (H x W, bool) to a box (XYWH)."""
    x, y, width, height = box
    return ObjectMask(mask[y : y + height, x : x + width], (x, y), mask.shape)


def sample_points(
    cutout: ObjectMask, counts: PointCounts, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sample positive points, then negative points. Missing points are padded with SAM's label -1.

    Returns:
        P x 2, XY, original frame, and P labels: 1 inside, 0 outside, -1 no point.
    """
    positive = _sample_positive(cutout, counts, generator)
    negative = _sample_negative(cutout, counts.negative, generator)
    points = np.zeros((counts.positive + counts.negative, 2), dtype=np.float32)
    labels = np.full(len(points), MISSING, dtype=np.int64)
    points[: len(positive)], labels[: len(positive)] = positive, POSITIVE
    end = counts.positive + len(negative)
    points[counts.positive : end], labels[counts.positive : end] = negative, NEGATIVE
    return points, labels


def sample_point_sets(
    cutout: ObjectMask, counts: PointCounts, sets: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sample points for up to `sets` prompts of one object, each as `sample_points` does.

    Returns:
        S x P x 2 and S x P. With a grid, no two sets share a point, and S is smaller if the grid has too few points
        inside the object, but at least 1.
    """
    sampled = []
    while len(sampled) < sets:
        sampled.append(sample_points(cutout, counts, generator))
        if counts.grid is None or counts.positive == 0:
            continue
        is_used = (counts.grid[:, None] == sampled[-1][0][None]).all(axis=2).any(axis=1)
        counts = replace(counts, grid=counts.grid[~is_used])
        if len(counts.grid) == 0:
            break
    points, labels = zip(*sampled, strict=True)
    return np.stack(points), np.stack(labels)


def find_center(cutout: ObjectMask) -> np.ndarray:
    """Return the pixel deepest inside the mask, XY, original frame. It lies inside even for a ring or a C."""
    y, x = np.unravel_index(distance_inside(cutout.mask).argmax(), cutout.mask.shape)
    return np.array([x, y], dtype=np.float32) + cutout.corner


def build_image_grid(points_per_side: int, original_size: tuple[int, int]) -> np.ndarray:
    """Return the generator's grid of an image, K x 2, XY, original frame."""
    return (build_point_grid(points_per_side) * (original_size[1], original_size[0])).astype(np.float32)


def find_grid_points_inside(cutout: ObjectMask, grid: np.ndarray, scale: float) -> np.ndarray:
    """Return the points of the grid that lie inside the mask, K x 2, XY, original frame.

    SAM treats a coordinate in the input frame as a pixel index and adds half a pixel to reach the pixel's centre. A
    grid point is inside if the pixel at this centre is inside.

    Args:
        scale: input pixels per original pixel.
    """
    height, width = cutout.mask.shape
    pixels = np.floor(grid + 0.5 / scale).astype(np.int64)
    pixels = np.minimum(pixels, (cutout.image_size[1] - 1, cutout.image_size[0] - 1)) - cutout.corner
    in_box = ((pixels >= 0) & (pixels < (width, height))).all(axis=1)
    candidates, pixels = grid[in_box], pixels[in_box]
    return candidates[cutout.mask[pixels[:, 1], pixels[:, 0]]]


def _sample_positive(cutout: ObjectMask, counts: PointCounts, generator: np.random.Generator) -> np.ndarray:
    if counts.positive == 0:
        return np.zeros((0, 2), dtype=np.float32)
    if counts.grid is not None:
        return _sample_from_grid(cutout, counts, generator)
    pixels = _list_pixels(cutout, inside=True)
    # With replacement: an object of one pixel can still have three points.
    chosen = pixels[generator.integers(len(pixels), size=counts.positive)]
    if counts.use_center:
        chosen[0] = find_center(cutout)
    return chosen


def _sample_from_grid(cutout: ObjectMask, counts: PointCounts, generator: np.random.Generator) -> np.ndarray:
    """Sample grid points inside, without repeats; fewer than `counts.positive` if the object covers fewer."""
    if len(counts.grid) == 0:
        return find_center(cutout)[None]
    shuffled = counts.grid[generator.permutation(len(counts.grid))]
    if counts.use_center:
        distances = np.linalg.norm(shuffled - find_center(cutout), axis=1)
        nearest = int(distances.argmin())
        shuffled[[0, nearest]] = shuffled[[nearest, 0]]
    return shuffled[: counts.positive]


def _sample_negative(cutout: ObjectMask, count: int, generator: np.random.Generator) -> np.ndarray:
    """Sample pixels outside the mask: in its box, where they teach most, or around the box if the mask fills it."""
    if count == 0:
        return np.zeros((0, 2), dtype=np.float32)
    pixels = _list_pixels(cutout, inside=False)
    if len(pixels) == 0:
        pixels = _sample_around(cutout, count, generator)
    if len(pixels) == 0:
        return pixels
    return pixels[generator.integers(len(pixels), size=count)]


def _list_pixels(cutout: ObjectMask, inside: bool) -> np.ndarray:
    ys, xs = np.nonzero(cutout.mask == inside)
    return np.stack([xs, ys], axis=1).astype(np.float32) + np.array(cutout.corner, dtype=np.float32)


def _sample_around(cutout: ObjectMask, count: int, generator: np.random.Generator) -> np.ndarray:
    """Sample pixels of the image outside the box; none if the box is the whole image."""
    (height, width), (image_height, image_width) = cutout.mask.shape, cutout.image_size
    x0, y0 = cutout.corner
    # The strips around the box, x0, y0, x1, y1. A strip is chosen in proportion to its area.
    strips = np.array(
        [
            (0, 0, image_width, y0),
            (0, y0 + height, image_width, image_height),
            (0, y0, x0, y0 + height),
            (x0 + width, y0, image_width, y0 + height),
        ]
    )
    areas = (strips[:, 2] - strips[:, 0]) * (strips[:, 3] - strips[:, 1])
    if areas.sum() == 0:
        return np.zeros((0, 2), dtype=np.float32)
    chosen = strips[generator.choice(4, size=count, p=areas / areas.sum())]
    return generator.integers(chosen[:, :2], chosen[:, 2:]).astype(np.float32)


def jitter_box(box: np.ndarray, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Add noise to each side of a box (XYXY). The box stays in the image and at least one pixel wide.

    Args:
        size: (height, width) of the box's frame.
    """
    sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    noise = generator.normal(size=4) * BOX_JITTER_RATIO * sides
    noise = np.clip(noise, -BOX_JITTER_MAX_PIXELS, BOX_JITTER_MAX_PIXELS)
    limits = np.array([size[1], size[0]] * 2)
    x0, y0, x1, y1 = np.clip(box + noise, 0, limits)
    if x1 - x0 < 1 or y1 - y0 < 1:
        return box
    return np.array([x0, y0, x1, y1])


def coarsen_mask(mask: np.ndarray, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Return a mask prompt like a rough sketch: the mask blurred, shifted, grown or shrunk, as logits.

    The true mask as a prompt would teach the decoder to copy its input.

    Args:
        mask: H x W, bool, original frame.
        size: (height, width) of the part of the mask prompt that the image covers.

    Returns:
        Logits of that size, float32.
    """
    cover = shrink_mask(mask, size)
    ys, xs = np.nonzero(cover > 0)
    extent = max(np.ptp(ys), np.ptp(xs)) + 1
    # A blur and a shift of about a tenth of the object's extent remove the boundary and keep the position.
    blurred = blur(np.pad(cover, 1), max(1.0, 0.1 * extent * generator.uniform(0.5, 1.5)))[1:-1, 1:-1]
    shift = np.round(generator.normal(size=2) * 0.05 * extent).astype(int)
    moved = np.roll(blurred, shift, axis=(0, 1))
    level = moved / max(float(moved.max()), 1e-6) - generator.uniform(0.3, 0.6)
    return np.clip(level * (2 * MASK_LOGIT), -MASK_LOGIT, MASK_LOGIT).astype(np.float32)
