"""Drawn images of two categories that look different: dark red balls, bright green crates."""

import json
from pathlib import Path

import numpy as np

from finestsam.images.files import write_image
from finestsam.masks import describe_mask

SIDE, CELL = 96, 48
# Names that a careless page would take for HTML, and ids that are neither 1, 2 nor in the order of the list.
CATEGORIES = {7: "crate", 3: "ball <b> & co"}


def write_named_shapes(root: Path, count: int, seed: int = 0, categories: dict[int, str] | None = None) -> Path:
    """Write a COCO dataset into `root`, in finestSAM's auto-split layout: in each quarter of an image one or none."""
    draw = np.random.default_rng(seed)
    folder = root / "data" / "images"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        image = draw.normal(128, 6, (SIDE, SIDE, 3))
        for cell in range(4):
            if draw.random() < 0.15:
                continue
            category = int(draw.choice([3, 7]))
            mask = _render_shape(draw, category, cell)
            colour = {3: (120, 30, 30), 7: (90, 220, 90)}[category] + draw.normal(0, 10, 3)
            image[mask] = colour + draw.normal(0, 6, (int(mask.sum()), 3))
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotations.append(ids | describe_mask(mask))
        name = f"{number}.png"
        write_image(folder / name, image.clip(0, 255).astype(np.uint8))
        images.append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
    listed = [{"id": number, "name": name} for number, name in (categories or CATEGORIES).items()]
    content = {"images": images, "annotations": annotations, "categories": listed}
    (root / "data" / "annotations.json").write_text(json.dumps(content))
    return root


def _render_shape(draw: np.random.Generator, category: int, cell: int) -> np.ndarray:
    """Return the mask of a disc or a square in a quarter of the image, SIDE x SIDE, bool."""
    radius = draw.uniform(12, 20)
    y, x = (CELL * place + draw.uniform(radius + 1, CELL - radius - 1) for place in divmod(cell, 2))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    if category == 3:
        return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return (abs(rows - y) <= 0.9 * radius) & (abs(columns - x) <= 0.9 * radius)
