"""Draw the prompts of one object from its mask: points, box, coarse mask.

Everything here is a pure function of the mask and the random generator that comes in. Points are drawn in pixels of the
original frame; the dataset brings them to the input frame.
"""

from dataclasses import dataclass, replace

import numpy as np

from finestsam.images.frames import blur, build_point_grid, shrink_mask
from finestsam.masks import distance_inside

POSITIVE, NEGATIVE, MISSING = 1, 0, -1
# The magnitude of SAM's own logits inside an object; a prompt of other magnitude would be a stranger to the decoder.
MASK_LOGIT = 6.0


@dataclass(frozen=True)
class ObjectMask:
    """One object, cut out of its image: everything is drawn from the pixels in its box."""

    mask: np.ndarray  # h x w, bool, the pixels in the box
    corner: tuple[int, int]  # (x, y) of the box in the image
    image_size: tuple[int, int]


@dataclass(frozen=True)
class PointCounts:
    """What `sample_points` draws."""

    positive: int
    negative: int
    use_center: bool
    grid: np.ndarray | None  # K x 2, XY, original frame: positive points are snapped to it; None: any pixel


def cut_out(mask: np.ndarray, box: list[int]) -> ObjectMask:
    """Cut the box (XYWH) out of an image's mask (H x W, bool)."""
    x, y, width, height = box
    return ObjectMask(mask[y : y + height, x : x + width], (x, y), mask.shape)


def sample_points(
    found: ObjectMask, counts: PointCounts, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw positive points, then negative ones; what cannot be had is padded with SAM's label -1.

    Returns:
        P x 2, XY, original frame, and P labels: 1 inside, 0 outside, -1 no point.
    """
    positive = _sample_positive(found, counts, generator)
    negative = _sample_negative(found, counts.negative, generator)
    points = np.zeros((counts.positive + counts.negative, 2), dtype=np.float32)
    labels = np.full(len(points), MISSING, dtype=np.int64)
    points[: len(positive)], labels[: len(positive)] = positive, POSITIVE
    end = counts.positive + len(negative)
    points[counts.positive : end], labels[counts.positive : end] = negative, NEGATIVE
    return points, labels


def sample_point_sets(
    found: ObjectMask, counts: PointCounts, sets: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw points for up to `sets` prompts of one object, as `sample_points` does for one.

    Returns:
        S x P x 2 and S x P. Where points are snapped to the grid no two sets share one, and there are as many sets as
        the points of the grid inside the object are enough for, at least one.
    """
    drawn = []
    while len(drawn) < sets:
        drawn.append(sample_points(found, counts, generator))
        if counts.grid is None or counts.positive == 0:
            continue
        is_used = (counts.grid[:, None] == drawn[-1][0][None]).all(axis=2).any(axis=1)
        counts = replace(counts, grid=counts.grid[~is_used])
        if len(counts.grid) == 0:
            break
    points, labels = zip(*drawn, strict=True)
    return np.stack(points), np.stack(labels)


def find_center(found: ObjectMask) -> np.ndarray:
    """Return the pixel deepest inside the mask (XY, original frame): for a ring or a C it lies in the body."""
    y, x = np.unravel_index(distance_inside(found.mask).argmax(), found.mask.shape)
    return np.array([x, y], dtype=np.float32) + found.corner


def build_image_grid(points_per_side: int, original_size: tuple[int, int]) -> np.ndarray:
    """Return the generator's grid of an image, K x 2, XY, original frame."""
    return (build_point_grid(points_per_side) * (original_size[1], original_size[0])).astype(np.float32)


def find_grid_points_inside(found: ObjectMask, grid: np.ndarray, scale: float) -> np.ndarray:
    """Return the points of the grid that lie inside the mask, K x 2, XY, original frame.

    SAM takes a coordinate in the input frame as the index of a pixel and adds half a pixel to reach its middle; the
    pixel meant by a point of the grid is the one that this middle falls into.

    Args:
        scale: input pixels per original pixel.
    """
    height, width = found.mask.shape
    pixels = np.floor(grid + 0.5 / scale).astype(np.int64)
    pixels = np.minimum(pixels, (found.image_size[1] - 1, found.image_size[0] - 1)) - found.corner
    in_box = ((pixels >= 0) & (pixels < (width, height))).all(axis=1)
    candidates, pixels = grid[in_box], pixels[in_box]
    return candidates[found.mask[pixels[:, 1], pixels[:, 0]]]


def _sample_positive(found: ObjectMask, counts: PointCounts, generator: np.random.Generator) -> np.ndarray:
    if counts.positive == 0:
        return np.zeros((0, 2), dtype=np.float32)
    if counts.grid is not None:
        return _sample_from_grid(found, counts, generator)
    pixels = _list_pixels(found, inside=True)
    # With replacement: an object of one pixel can still have three points.
    chosen = pixels[generator.integers(len(pixels), size=counts.positive)]
    if counts.use_center:
        chosen[0] = find_center(found)
    return chosen


def _sample_from_grid(found: ObjectMask, counts: PointCounts, generator: np.random.Generator) -> np.ndarray:
    """Choose grid points inside, without repeats: fewer than wanted where the object covers fewer."""
    if len(counts.grid) == 0:
        return find_center(found)[None]
    shuffled = counts.grid[generator.permutation(len(counts.grid))]
    if counts.use_center:
        distances = np.linalg.norm(shuffled - find_center(found), axis=1)
        nearest = int(distances.argmin())
        shuffled[[0, nearest]] = shuffled[[nearest, 0]]
    return shuffled[: counts.positive]


def _sample_negative(found: ObjectMask, count: int, generator: np.random.Generator) -> np.ndarray:
    """Choose pixels outside the mask: in its box, where they teach most, or around it where the mask fills the box."""
    if count == 0:
        return np.zeros((0, 2), dtype=np.float32)
    pixels = _list_pixels(found, inside=False)
    if len(pixels) == 0:
        pixels = _sample_around(found, count, generator)
    if len(pixels) == 0:
        return pixels
    return pixels[generator.integers(len(pixels), size=count)]


def _list_pixels(found: ObjectMask, inside: bool) -> np.ndarray:
    ys, xs = np.nonzero(found.mask == inside)
    return np.stack([xs, ys], axis=1).astype(np.float32) + np.array(found.corner, dtype=np.float32)


def _sample_around(found: ObjectMask, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw pixels of the image outside the box; none where the box is the whole image."""
    (height, width), (image_height, image_width) = found.mask.shape, found.image_size
    x0, y0 = found.corner
    # Each side's strip as x0, y0, x1, y1; a strip is drawn in proportion to its area.
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


def jitter_box(
    box: np.ndarray, size: tuple[int, int], ratio: float, max_pixels: float, generator: np.random.Generator
) -> np.ndarray:
    """Move each side of a box (XYXY) by noise, and keep it in the image and at least a pixel wide.

    The recipe of the SAM paper (arXiv 2304.02643, appendix A): standard deviation 10 % of the side, at most 20 pixels.

    Args:
        size: (height, width) of the frame that the box is in.
        ratio: standard deviation of the noise, share of the box's width and height.
        max_pixels: largest noise.
    """
    sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    noise = np.clip(generator.normal(size=4) * ratio * sides, -max_pixels, max_pixels)
    limits = np.array([size[1], size[0]] * 2)
    x0, y0, x1, y1 = np.clip(box + noise, 0, limits)
    if x1 - x0 < 1 or y1 - y0 < 1:
        return box
    return np.array([x0, y0, x1, y1])


def coarsen_mask(mask: np.ndarray, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Return a mask prompt as somebody would scribble it: blurred, shifted, grown or shrunk, as logits.

    The truth itself would teach the decoder to copy its input.

    Args:
        mask: H x W, bool, original frame.
        size: (height, width) of the mask prompt's part that holds the image.

    Returns:
        Logits of that size, float32.
    """
    cover = shrink_mask(mask, size)
    ys, xs = np.nonzero(cover > 0)
    extent = max(np.ptp(ys), np.ptp(xs)) + 1
    # Blurred by a tenth of its extent and moved by as much: boundaries are lost, the place is kept.
    blurred = blur(np.pad(cover, 1), max(1.0, 0.1 * extent * generator.uniform(0.5, 1.5)))[1:-1, 1:-1]
    shift = np.round(generator.normal(size=2) * 0.05 * extent).astype(int)
    moved = np.roll(blurred, shift, axis=(0, 1))
    level = moved / max(float(moved.max()), 1e-6) - generator.uniform(0.3, 0.6)
    return np.clip(level * (2 * MASK_LOGIT), -MASK_LOGIT, MASK_LOGIT).astype(np.float32)
