"""Convert between masks, run lengths, polygons and boxes, and measure them.

An `rle` is COCO's compressed run-length encoding as in pycocotools: `{"size": [height, width], "counts": bytes}`. Runs
are in column-major order; the first run is outside the mask.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from finestsam.errors import Defect

if TYPE_CHECKING:  # importing torch takes seconds; processes that only read annotations do not need it
    from torch import Tensor

# A larger coordinate means a broken file. pycocotools allocates 60 bytes a pixel of it, until the process is killed.
MAX_COORDINATE_PIXELS = 100_000
# pycocotools stores 50 bytes for each pixel of an outline. An outline has at most twice the pixels of its image, unless
# it passes the same pixels many times.
OUTLINE_PER_PIXEL = 4
MIN_OUTLINE_LIMIT, MAX_OUTLINE_LIMIT = 1_000_000, 10_000_000
# Thickness of a boundary, share of the image's diagonal.
BOUNDARY_SHARE = 0.02

Remark = tuple[str, str]  # code and message; the annotation or image is used anyway


def segmentation_to_rle(segmentation: object, size: tuple[int, int], remarks: list[Remark] | None = None) -> dict:
    """Read COCO's `segmentation` in any of its forms: polygons, compressed or uncompressed run lengths.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...], one such polygon, or {"size": ..., "counts": ...}.
        size: (height, width) of the image.
        remarks: receives a remark for each unusual way of writing that was read anyway.

    Raises:
        Defect: the shape gives no mask. This is checked before pycocotools, which takes all memory for numbers that
            are not finite and returns uninitialised memory for short run lengths.
    """
    if isinstance(segmentation, dict):
        rle = _run_lengths_to_rle(segmentation, size)
    else:
        rle = polygons_to_rle(_list_polygons(segmentation, size, [] if remarks is None else remarks), size)
    if rle_area(rle) == 0:
        raise Defect("empty_mask", "the mask has no pixel inside the image")
    return rle


def polygons_to_rle(polygons: list[list[float]], size: tuple[int, int]) -> dict:
    """Fill polygons [x0, y0, x1, y1, ...] of at least three points as one mask, by pycocotools' rule."""
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))


def _list_polygons(segmentation: object, size: tuple[int, int], remarks: list[Remark]) -> list[list[float]]:
    if segmentation is None or segmentation == [] or segmentation == [[]]:
        raise Defect("empty_segmentation", "empty segmentation")
    if not isinstance(segmentation, list):
        raise Defect("not_a_polygon", f"expected polygons or run lengths, got {str(segmentation)[:40]!r}")
    parts = segmentation
    if not isinstance(segmentation[0], list):
        parts = [segmentation]
        remarks.append(("flat_polygon", "a flat list of coordinates, read as one polygon"))
    polygons = [polygon for polygon in (_read_polygon(part, size, remarks) for part in parts) if len(polygon) >= 6]
    if not polygons:
        raise Defect("too_few_points", "no polygon with three points or more")
    if len(polygons) < len(parts):
        remarks.append(("part_dropped", f"{len(parts) - len(polygons)} parts with fewer than three points left out"))
    _refuse_long_outline(polygons, size)
    return polygons


def _refuse_long_outline(polygons: list[list[float]], size: tuple[int, int]) -> None:
    """Raise a Defect if filling the polygons would take seconds and gigabytes."""
    limit = min(max(OUTLINE_PER_PIXEL * size[0] * size[1], MIN_OUTLINE_LIMIT), MAX_OUTLINE_LIMIT)
    length = sum(map(_measure_outline, polygons))
    if length > limit:
        outline = f"an outline of {length:.3g} pixels in an image of {size[1]} x {size[0]}"
        raise Defect("long_outline", f"{outline}, expected at most {limit}: it passes the same pixels many times")


def _measure_outline(polygon: list[float]) -> float:
    """Return the number of pixels on a polygon's outline. A diagonal step counts as one pixel."""
    corners = np.array(polygon).reshape(-1, 2)
    steps = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1)
    return float(steps.sum() + len(corners))


def _read_polygon(part: object, size: tuple[int, int], remarks: list[Remark]) -> list[float]:
    try:
        numbers = [float(number) for number in part]
    except (TypeError, ValueError):
        raise Defect("not_a_number", f"a polygon holds something that is not a number: {str(part)[:60]}") from None
    except OverflowError:  # an integer beyond 10^308
        raise Defect("far_outside", f"a polygon has a coordinate beyond any image: {str(part)[:60]}") from None
    if any(isinstance(number, str) for number in part):
        remarks.append(("text_coordinates", "coordinates written as text, read as numbers"))
    if len(numbers) % 2:
        raise Defect("odd_coordinates", f"a polygon has {len(numbers)} coordinates, x and y must come in pairs")
    if not all(map(math.isfinite, numbers)):
        raise Defect("not_finite", "a polygon has a coordinate that is not finite")
    farthest = max(map(abs, numbers), default=0)
    if farthest > max(MAX_COORDINATE_PIXELS, 10 * max(size)):
        raise Defect("far_outside", f"coordinate {farthest:g} in an image of {size[1]} x {size[0]} pixels")
    if numbers and (min(numbers) < -1 or max(numbers[::2]) > size[1] + 1 or max(numbers[1::2]) > size[0] + 1):
        remarks.append(("clipped", "extends beyond the image, cut at its edge"))
    return numbers


def _run_lengths_to_rle(segmentation: dict, size: tuple[int, int]) -> dict:
    rle_size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(rle_size, list) or list(rle_size) != list(size):
        hint = "; height and width look exchanged" if rle_size == list(size[::-1]) else ""
        raise Defect(
            "rle_size", f"run lengths of size {rle_size!s:.40} in an image of height and width {list(size)}{hint}"
        )
    pixel_count = size[0] * size[1]
    if isinstance(counts, str | bytes):
        counts = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
        runs = _decode_counts(counts)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = np.array([run if 0 <= run <= pixel_count else -1 for run in counts], dtype=np.int64)
    else:
        raise Defect("rle_counts", f"run lengths must be a string or a list of integers: {str(counts)[:60]}")
    # Checked before summing: the sum of long runs can overflow to a valid number.
    if ((runs < 0) | (runs > pixel_count)).any():
        raise Defect("rle_counts", f"run lengths below 0 or above the {pixel_count} pixels of the image")
    if int(runs.sum()) != pixel_count:
        raise Defect("rle_counts", f"run lengths cover {int(runs.sum())} of {pixel_count} pixels")
    if isinstance(counts, bytes):
        return {"size": list(size), "counts": counts}
    return coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)


def _decode_counts(text: bytes) -> np.ndarray:
    """Decode run lengths from text: 5 bits a character, lowest bits first, runs from the third on as differences.

    Source: `rleFrString` in pycocotools' maskApi.c.
    """
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 0x20:
        raise Defect("rle_counts", f"run lengths are cut or garbled: {text[:40]!r}")
    ends = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 8:
        raise Defect("rle_counts", "a run length is longer than any image")
    positions = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 0x1F) << (5 * positions), starts)
    values -= np.where(codes[ends] & 0x10, 1 << (5 * (ends - starts + 1)), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def join_rles(rles: list[dict]) -> dict:
    """Return the union of one or more masks of the same size."""
    return coco_mask.merge(rles)


def box_to_rle(box: list[int], size: tuple[int, int]) -> dict:
    """Return the mask of a box, XYWH, whole pixels, in an image of (height, width) `size`."""
    return coco_mask.frPyObjects(np.array([box], dtype=np.float64), *size)[0]


def shared_area(rle: dict, other: dict) -> int:
    """Return the number of pixels inside both masks, which have the same size. No mask is decoded."""
    return rle_area(coco_mask.merge([rle, other], intersect=True))


def labels_to_rles(labels: np.ndarray) -> dict[int, dict]:
    """Return {number: mask} for every number except 0 in a label image, H x W, int.

    One pass over the pixels finds all of them: thousands of objects take as long as one.
    """
    height, width = labels.shape
    flat = labels.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.concatenate([starts[1:], [flat.size]])
    numbers = flat[starts]
    order = np.argsort(numbers, kind="stable")
    found, firsts = np.unique(numbers[order], return_index=True)
    rles = {}
    for number, runs in zip(found.tolist(), np.split(order, firsts[1:]), strict=True):
        if number != 0:
            # Runs outside, inside, outside, ...; the last one ends with the image.
            edges = np.stack([starts[runs], ends[runs]], axis=1).ravel()
            counts = np.diff(edges, prepend=0, append=flat.size).tolist()
            rles[number] = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return rles


def find_runs(rle: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pixel of each run inside a mask, R, and the pixel after its end, R, in column-major order."""
    edges = _decode_counts(rle["counts"]).cumsum()
    return edges[: len(edges) // 2 * 2 : 2], edges[1::2]


def encode_mask(mask: np.ndarray) -> dict:
    """Compress one mask, H x W, bool."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def decode_rle(rle: dict) -> np.ndarray:
    """Return the mask, H x W, bool."""
    return coco_mask.decode(rle).astype(bool)


def decode_rles(rles: list[dict]) -> Tensor:
    """Return the masks of one image, N x H x W, bool, N at least 1."""
    import torch

    masks = coco_mask.decode(rles)  # H x W x N
    return torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1))).bool()


def count_overlap(masks: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of pixels in both masks and the sum of the two areas, from which IoU and Dice follow.

    Args:
        masks: ... x H x W, bool.
        truth: the same shape, or one that broadcasts to it, bool.
    """
    shared = (masks & truth).sum(dim=(-2, -1))
    return shared, masks.sum(dim=(-2, -1)) + truth.sum(dim=(-2, -1))


def rle_area(rle: dict) -> int:
    """Return the number of pixels inside."""
    return int(coco_mask.area(rle))


def rle_box(rle: dict) -> list[int]:
    """Return the box around the pixels inside, [x, y, width, height]."""
    return [int(side) for side in coco_mask.toBbox(rle)]


def rle_to_json(rle: dict) -> dict:
    """Return the run lengths with the counts as text, for json."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def describe_mask(mask: np.ndarray) -> dict:
    """Return the fields of a COCO annotation that follow from its mask (H x W, bool)."""
    rle = encode_mask(mask)
    return {"segmentation": rle_to_json(rle), "bbox": rle_box(rle), "area": rle_area(rle), "iscrowd": 0}


def rle_from_json(rle: dict) -> dict:
    """Return the run lengths that `rle_to_json` wrote."""
    return {"size": list(rle["size"]), "counts": rle["counts"].encode("ascii")}


def rle_to_polygons(rle: dict) -> list[list[float]]:
    """Return the outlines [x0, y0, x1, y1, ...] of a mask's parts, largest part first. Holes are filled.

    An outline runs a quarter of a pixel inside the mask's edge: filling it by pixel centres gives the same mask.
    """
    x, y, width, height = rle_box(rle)
    mask = decode_rle(rle)[y : y + height, x : x + width]
    doubled = mask.repeat(2, axis=0).repeat(2, axis=1).astype(np.uint8)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    parts = sorted((contour[:, 0] for contour in contours), key=lambda part: -cv2.contourArea(part))
    return [((part + 0.5) / 2 + (x, y)).ravel().tolist() for part in parts]


def rle_overlaps(rles: list[dict], truth: list[dict], over_own_area: bool = False) -> np.ndarray:
    """Return the IoU of every mask with every true mask, K x G.

    Args:
        over_own_area: return the share of the mask inside the true mask instead, as COCO does for crowds.
    """
    if not rles or not truth:
        return np.zeros((len(rles), len(truth)))
    return np.asarray(coco_mask.iou(list(rles), list(truth), [int(over_own_area)] * len(truth)))


def box_iou(one: list[float], other: list[float]) -> float:
    """Return the IoU of two boxes [x, y, width, height]; 0 if both are empty."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    together = one[2] * one[3] + other[2] * other[3] - shared
    return shared / together if together > 0 else 0.0


def find_components(mask: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the number of 8-connected regions of a mask (H x W, bool) and their labels, H x W, 0 outside."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return count - 1, labels


def find_largest_component(mask: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the largest 8-connected region of a mask (H x W, bool), cropped to its box, and the box's corner, XY.

    For an empty mask the region is empty.
    """
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if len(boxes) == 1:  # only the background
        return mask[:0, :0], (0, 0)
    largest = 1 + int(boxes[1:, cv2.CC_STAT_AREA].argmax())
    x, y, width, height = boxes[largest, :4].tolist()
    return labels[y : y + height, x : x + width] == largest, (x, y)


def rasterize(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fill one polygon, K x 2, XY pixels, and return the mask, H x W, bool."""
    mask = np.zeros(size, dtype=np.uint8)
    # 4 fractional bits: vertices are exact to 1/16 pixel.
    cv2.fillPoly(mask, [np.round(polygon * 16).astype(np.int32)], 1, shift=4)
    return mask.astype(bool)


def distance_inside(mask: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel inside to the nearest pixel outside, H x W, float32, pixels.

    Pixels beyond the image's edge count as outside: the centre of an object cut by the edge is not on the edge.
    """
    framed = np.pad(mask.astype(np.uint8), 1)
    return cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1]


def find_boundary(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Return the pixels of a mask (H x W, bool) that are at most `thickness` steps from a pixel outside.

    Pixels beyond the image's edge count as outside. Steps go to all eight neighbours.
    """
    framed = np.pad(mask.astype(np.uint8), 1)
    inner = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=thickness, borderValue=0)[1:-1, 1:-1]
    return mask & (inner == 0)


def boundary_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the IoU of the boundaries of two masks, H x W, bool; 1 if both masks are empty.

    A boundary reaches 2 % of the image's diagonal into the mask. Source: Cheng et al., Boundary IoU (arXiv 2103.16562).
    """
    thickness = max(1, round(BOUNDARY_SHARE * math.hypot(*mask.shape)))
    rows, columns = (np.flatnonzero((mask | truth).any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return 1.0
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # the box around both masks
    boundary, true_boundary = find_boundary(mask[part], thickness), find_boundary(truth[part], thickness)
    return float(np.count_nonzero(boundary & true_boundary) / np.count_nonzero(boundary | true_boundary))


def remove_small_regions(mask: np.ndarray, min_area_pixels: int) -> np.ndarray:
    """Fill holes and remove islands smaller than `min_area_pixels`; the largest island always stays.

    Args:
        mask: H x W, bool.
    """
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return mask.copy()
    # Work on a part of the image with a margin, so wide that the outside of the mask is never taken for a small hole.
    margins = -(-min_area_pixels // np.array([np.ptp(columns) + 1, np.ptp(rows) + 1]))
    top, left = np.maximum([rows[0], columns[0]] - margins, 0)
    bottom, right = [rows[-1], columns[-1]] + margins + 1
    cleaned = mask.copy()
    cleaned[top:bottom, left:right] = _remove_small_regions(mask[top:bottom, left:right], min_area_pixels)
    return cleaned


def _remove_small_regions(mask: np.ndarray, min_area_pixels: int) -> np.ndarray:
    filled = mask | _find_small_regions(~mask, min_area_pixels)
    islands = _find_small_regions(filled, min_area_pixels)
    if (islands == filled).all():
        _, regions, stats, _ = cv2.connectedComponentsWithStats(filled.astype(np.uint8), connectivity=8)
        return regions == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return filled & ~islands


def _find_small_regions(mask: np.ndarray, min_area_pixels: int) -> np.ndarray:
    _, regions, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    is_small = stats[:, cv2.CC_STAT_AREA] < min_area_pixels
    is_small[0] = False  # label 0 is everything outside the mask
    return is_small[regions]
