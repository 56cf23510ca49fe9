"""Drawn pictures with exact instance masks, for the demo, the notebook, the tests and for training without a download.

A scene is a pure function of (seed, index, size, kind). Every kind draws a canvas (H x W x 3, float32, 0 to 255) and a
label map (H x W, int32: 0 is background, k the k-th object). The masks are read off the label map, so they never
overlap, and they stay exact because blur and noise touch the canvas only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finestsam.images import blur, write_image
from finestsam.masks import encode_mask, rasterize, rle_area, rle_box, rle_to_json

KINDS = ("shapes", "parcels", "blobs")
CATEGORIES = {"shapes": "shape", "parcels": "parcel", "blobs": "blob"}
MIN_AREA_FRACTION = 0.002  # of the picture; what shows less stays painted but gets no mask
MIN_CORE_FRACTION = 0.3  # of an object's pixels that touch only its own; below it, crumbs and slivers are left

OUTLINES = ("ellipse", "polygon", "star", "rectangle", "ring", "stroke")
PATTERNS = ("flat", "gradient", "noise", "stripes", "hatching", "checkers")
WASHES = np.array(
    [[238, 205, 190], [232, 190, 170], [240, 225, 175], [205, 218, 180], [200, 215, 220], [225, 215, 205]]
)


@dataclass
class Scene:
    """A picture and the visible pixels of its objects, in drawing order."""

    image: np.ndarray  # H x W x 3, uint8, RGB
    masks: list[np.ndarray]  # each H x W, bool, disjoint from the others
    categories: list[str]  # a value of CATEGORIES for each mask


def write_scenes(root: Path, count: int, seed: int = 0, size: tuple[int, int] = (256, 256)) -> Path:
    """Write a COCO dataset of scenes: data/images/scene_0000.png, ... and data/annotations.json under `root`.

    The aspect ratio takes turns between that of `size`, a wider and a taller one, as real datasets mix them.
    """
    height, width = size
    sizes = (size, (height * 7 // 8, width * 9 // 8), (height * 9 // 8, width * 7 // 8))
    category_ids = {name: number for number, name in enumerate(CATEGORIES.values(), start=1)}
    images, annotations = [], []
    (root / "data" / "images").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = draw_scene(seed, index, sizes[index % len(sizes)])
        name, (height, width) = f"scene_{index:04d}.png", scene.image.shape[:2]
        write_image(root / "data" / "images" / name, scene.image)
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for mask, category in zip(scene.masks, scene.categories, strict=True):
            numbers = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": category_ids[category]}
            annotations.append(numbers | describe_mask(mask))
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    info = {"description": f"{count} drawn scenes, seed {seed}"}
    coco = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (root / "data" / "annotations.json").write_text(json.dumps(coco), encoding="utf-8")
    return root


def describe_mask(mask: np.ndarray) -> dict:
    """Return the fields of a COCO annotation that follow from the mask (H x W, bool)."""
    rle = encode_mask(mask)
    return {"segmentation": rle_to_json(rle), "bbox": rle_box(rle), "area": rle_area(rle), "iscrowd": 0}


def draw_scene(seed: int, index: int, size: tuple[int, int] = (256, 256), kind: str | None = None) -> Scene:
    """Draw scene number `index` of a seed; without a kind, the seed chooses one of KINDS."""
    rng = np.random.default_rng([seed, index])
    kind = kind or KINDS[rng.integers(len(KINDS))]
    draw = {"shapes": draw_shapes, "parcels": draw_parcels, "blobs": draw_blobs}[kind]
    canvas, labels = draw(rng, size)
    masks = split_labels(labels)
    return Scene(develop(rng, canvas), masks, [CATEGORIES[kind]] * len(masks))


def split_labels(labels: np.ndarray) -> list[np.ndarray]:
    """Return one mask (H x W, bool) for each label that shows enough of itself, in the order of the labels."""
    areas = np.bincount(labels.ravel())
    core_areas = np.bincount(labels[~find_borders(labels)], minlength=len(areas))
    is_kept = (areas >= MIN_AREA_FRACTION * labels.size) & (core_areas >= MIN_CORE_FRACTION * areas)
    return [labels == label for label in range(1, len(areas)) if is_kept[label]]


def find_borders(labels: np.ndarray) -> np.ndarray:
    """Return the pixels (H x W, bool) beside a pixel of another label: lines two pixels wide."""
    borders = np.zeros(labels.shape, bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    borders[:, 1:] |= across
    borders[:, :-1] |= across
    borders[1:] |= down
    borders[:-1] |= down
    return borders


def develop(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Turn a canvas into a picture (uint8), as a lens and a sensor would: blur, contrast, brightness, noise."""
    canvas = blur(canvas, rng.uniform(0.3, 0.9))
    canvas = (canvas - 128) * np.float32(rng.uniform(0.75, 1.1)) + np.float32(128 + rng.uniform(-20, 20))
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(1, 7))
    return np.clip(canvas, 0, 255).astype(np.uint8)


def draw_shapes(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw dead leaves: textured shapes, the later ones over the earlier ones."""
    canvas, labels = draw_texture(rng, size), np.zeros(size, np.int32)
    radii = np.sqrt(np.prod(size)) * np.exp(rng.uniform(np.log(0.035), np.log(0.23), rng.integers(16, 36)))
    # Roughly the larger ones first: in a random order, the last few would hide most of the others.
    radii = radii[np.argsort(-radii * rng.uniform(0.5, 2, len(radii)))]
    for label, radius in enumerate(radii, start=1):
        polygon = turn(draw_outline(rng), rng.uniform(0, 2 * np.pi)) * radius + rng.uniform(0, 1, 2) * size[::-1]
        box, inside = fill(polygon, size)
        canvas[box][inside] = draw_texture(rng, inside.shape)[inside]
        labels[box][inside] = label
    return canvas, labels


def draw_outline(rng: np.random.Generator) -> np.ndarray:
    """Return a polygon (K x 2, XY) about as large as the unit circle."""
    circle = turn(np.array([[1.0, 0.0]]), np.linspace(0, 2 * np.pi, 48))
    corners = rng.integers(3, 8)
    angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    match rng.choice(OUTLINES):
        case "ellipse":
            return circle * [1, rng.uniform(0.4, 1)]
        case "polygon":
            return turn(np.array([[1.0, 0.0]]), angles) * [1, rng.uniform(0.6, 1)]
        case "star":
            tips = turn(np.array([[1.0, 0.0]]), np.arange(2 * corners) * np.pi / corners)
            return tips * np.tile([[1.1], [rng.uniform(0.4, 0.7)]], (corners, 1))
        case "rectangle":
            return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [0.9, rng.uniform(0.25, 0.9)]
        case "ring":
            # The way in to the hole and back lies inside the ring, so one polygon is enough.
            return np.vstack([circle, circle[::-1] * rng.uniform(0.4, 0.7)])
        case _:
            bend = rng.uniform(-1, 1, 2)
            line = np.linspace(-1.4, 1.4, 24)
            return widen(np.stack([line, bend[0] * line**2 + bend[1] * line**3 / 2], axis=1), rng.uniform(0.1, 0.2))
