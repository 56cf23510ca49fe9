"""Drawn images with exact instance masks: for the demo, the notebook, the tests, and training without a download.

A scene is a pure function of (seed, index, size, kind). Each kind draws a canvas (H x W x 3, float32, 0 to 255) and
label maps (each H x W, int: 0 is background, k the k-th object), one for each level of detail. Masks are read off the
label maps: those of one level never overlap, and the blur and noise of the canvas do not reach them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from finestsam.data.drawing import find_borders, render_blobs, render_shapes, render_things
from finestsam.data.facades import render_facades
from finestsam.data.quarters import render_quarters
from finestsam.data.scenery import render_scenery
from finestsam.data.town_plans import render_parcels, render_plans
from finestsam.images.files import write_image
from finestsam.images.frames import blur
from finestsam.masks import encode_mask, rle_area, rle_box, rle_to_json
from finestsam.runtime.processes import map_in_processes
from finestsam.runtime.whole_files import write_json

DRAWINGS = {
    "shapes": render_shapes,
    "parcels": render_parcels,
    "blobs": render_blobs,
    "plans": render_plans,
    "things": render_things,
    "quarters": render_quarters,
    "pebbles": partial(render_shapes, scale=0.4),
    "grains": partial(render_blobs, scale=0.4),
    "scenery": render_scenery,
    "facades": render_facades,
}
KINDS = ("shapes", "parcels", "blobs", "plans", "things")  # drawn where none is named
CATEGORIES = {
    "shapes": "shape", "parcels": "parcel", "blobs": "blob", "plans": "block", "things": "thing",
    "quarters": "quarter", "pebbles": "pebble", "grains": "grain", "scenery": "body", "facades": "window",
}  # fmt: skip
# An object that shows less stays painted but gets no mask: a share of the image, in a larger one these pixels.
MIN_AREA_FRACTION, MIN_AREA_PIXELS = 0.002, 132
MIN_CORE_FRACTION = 0.3  # of an object's visible pixels, those not on its border; crumbs and slivers have less


@dataclass
class Scene:
    """An image and the visible pixels of its objects, in drawing order."""

    image: np.ndarray  # H x W x 3, uint8, RGB
    masks: list[np.ndarray]  # each H x W, bool, level by level, disjoint from the others of its level
    categories: list[str]  # a value of CATEGORIES for each mask


def write_scenes(
    root: Path, count: int, seed: int = 0, size: tuple[int, int] = (256, 256), kinds: Sequence[str] | None = None
) -> Path:
    """Write a COCO dataset of scenes, data/images/scene_0000.png, ... and data/annotations.json, into `root`.

    `kinds` are drawn in turn; one that is named twice comes twice as often. Without them, the seed chooses one of KINDS
    for each scene.

    The aspect ratio takes turns between that of `size`, a wider and a taller one, as real datasets mix them.
    """
    height, width = size
    sizes = (size, (height * 7 // 8, width * 9 // 8), (height * 9 // 8, width * 7 // 8))
    drawn = kinds or [None]
    names = [*KINDS, *(kind for kind in dict.fromkeys(drawn) if kind not in (None, *KINDS))]
    category_ids = {CATEGORIES[kind]: number for number, kind in enumerate(names, start=1)}
    images, annotations = [], []
    folder = root / "data" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scene_{index:04d}.png" for index in range(count)]
    tasks = [
        (path, seed, index, sizes[index % len(sizes)], drawn[index % len(drawn)]) for index, path in enumerate(paths)
    ]
    for (path, _, index, (height, width), _), objects in zip(
        tasks, map_in_processes(_write_scene, tasks, "drawing"), strict=True
    ):
        images.append({"id": index + 1, "file_name": path.name, "height": height, "width": width})
        for category, described in objects:
            ids = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": category_ids[category]}
            annotations.append(ids | described)
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    info = {"description": f"{count} drawn scenes, seed {seed}"}
    coco = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    write_json(root / "data" / "annotations.json", coco)
    return root


def _write_scene(task: tuple[Path, int, int, tuple[int, int], str | None]) -> list[tuple[str, dict]]:
    """Draw a scene into a file, and return its objects: their categories, and what `describe_mask` says of them."""
    path, seed, index, size, kind = task
    scene = render_scene(seed, index, size, kind)
    write_image(path, scene.image)
    return [(category, describe_mask(mask)) for category, mask in zip(scene.categories, scene.masks, strict=True)]


def describe_mask(mask: np.ndarray) -> dict:
    """Return the fields of a COCO annotation that follow from its mask (H x W, bool)."""
    rle = encode_mask(mask)
    return {"segmentation": rle_to_json(rle), "bbox": rle_box(rle), "area": rle_area(rle), "iscrowd": 0}


def render_scene(seed: int, index: int, size: tuple[int, int] = (256, 256), kind: str | None = None) -> Scene:
    """Draw scene number `index` of a seed; without a kind, the seed chooses one of KINDS."""
    rng = np.random.default_rng([seed, index])
    kind = kind or KINDS[rng.integers(len(KINDS))]
    canvas, levels = DRAWINGS[kind](rng, size)
    masks = [mask for labels in levels for mask in split_labels(labels)]
    return Scene(develop(rng, canvas), masks, [CATEGORIES[kind]] * len(masks))


def split_labels(labels: np.ndarray) -> list[np.ndarray]:
    """Return one mask (H x W, bool) for each label that shows enough of itself, in the order of the labels."""
    areas = np.bincount(labels.ravel())
    core_areas = np.bincount(labels[~find_borders(labels)], minlength=len(areas))
    min_area = min(MIN_AREA_FRACTION * labels.size, MIN_AREA_PIXELS)
    is_kept = (areas >= min_area) & (core_areas >= MIN_CORE_FRACTION * areas)
    return [labels == label for label in range(1, len(areas)) if is_kept[label]]


def develop(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Return the canvas as a camera would see it: blur, contrast, brightness, noise (H x W x 3, uint8)."""
    canvas = blur(canvas, rng.uniform(0.3, 0.9))
    canvas = (canvas - 128) * np.float32(rng.uniform(0.75, 1.1)) + np.float32(128 + rng.uniform(-20, 20))
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(1, 7))
    return np.clip(canvas, 0, 255).astype(np.uint8)
