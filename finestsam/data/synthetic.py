"""Drawn images with exact instance masks: for the demo, the notebook, the tests, and checks without a download.

A scene is a pure function of (seed, index, size, kind). Each kind renders a canvas (H x W x 3, float32, 0 to 255) and
label maps (each H x W, int: 0 is background, k the k-th object), one for each level of detail, without blur or noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from finestsam.images.files import write_image
from finestsam.images.frames import blur
from finestsam.masks import describe_mask, rasterize
from finestsam.runtime.processes import map_in_processes
from finestsam.runtime.whole_files import write_json

# An object that shows less stays painted but gets no mask: a share of the image, in a larger one these pixels.
MIN_AREA_FRACTION, MIN_AREA_PIXELS = 0.002, 132
MIN_CORE_FRACTION = 0.3  # of an object's visible pixels, those not on its border; crumbs and slivers have less
SQUARE = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])  # the order of the corners of a quad
WALLS = ((164, 92, 72), (186, 120, 90), (214, 196, 160), (196, 178, 150), (226, 216, 200), (150, 150, 152))
FRAMES = ((236, 234, 226), (222, 206, 176), (92, 66, 48), (54, 74, 66))
PAINTS = ((58, 92, 76), (112, 54, 44), (70, 86, 120), (122, 92, 62))

Box = tuple[slice, slice]  # rows and columns of an image
Area = tuple[Box, np.ndarray]  # a box and the mask in it (h x w, bool)
Drawn = tuple[np.ndarray, list[np.ndarray]]  # a canvas and its label maps


@dataclass(frozen=True)
class Kind:
    """What a scene shows."""

    category: str  # of all its objects
    draw: Callable[[np.random.Generator, tuple[int, int]], Drawn]  # from a (height, width)


@dataclass
class Scene:
    """An image and the visible pixels of its objects, in drawing order."""

    image: np.ndarray  # H x W x 3, uint8, RGB
    masks: list[np.ndarray]  # each H x W, bool, level by level, disjoint from the others of its level


def write_scenes(
    root: Path, count: int, seed: int = 0, size: tuple[int, int] = (256, 256), kinds: Sequence[Kind] | None = None
) -> Path:
    """Write a COCO dataset of scenes, data/images/scene_0000.png, ... and data/annotations.json, into `root`.

    `kinds` are drawn in turn, one that is listed twice comes twice as often; without them, shapes and house fronts.
    The aspect ratio takes turns between that of `size`, a wider and a taller one, as real datasets mix them.
    """
    (height, width), kinds = size, kinds or (SHAPES, FACADES)
    sizes = (size, (height * 7 // 8, width * 9 // 8), (height * 9 // 8, width * 7 // 8))
    categories = {name: number for number, name in enumerate(dict.fromkeys(kind.category for kind in kinds), start=1)}
    (folder := root / "data" / "images").mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scene_{index:04d}.png" for index in range(count)]
    tasks = [(path, seed, index, sizes[index % 3], kinds[index % len(kinds)]) for index, path in enumerate(paths)]
    images, annotations = [], []
    written = map_in_processes(_write_scene, tasks, "drawing")
    for (path, _, index, (height, width), kind), objects in zip(tasks, written, strict=True):
        images.append({"id": index + 1, "file_name": path.name, "height": height, "width": width})
        for described in objects:
            ids = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": categories[kind.category]}
            annotations.append(ids | described)
    listed = [{"id": number, "name": name} for name, number in categories.items()]
    write_json(root / "data" / "annotations.json", {"images": images, "annotations": annotations, "categories": listed})
    return root


def _write_scene(task: tuple[Path, int, int, tuple[int, int], Kind]) -> list[dict]:
    path, seed, index, size, kind = task
    scene = render_scene(seed, index, size, kind)
    write_image(path, scene.image)
    return [describe_mask(mask) for mask in scene.masks]


def render_scene(seed: int, index: int, size: tuple[int, int] = (256, 256), kind: Kind | None = None) -> Scene:
    """Draw scene number `index` of a seed, by default shapes, as a camera would see it: blurred and noisy."""
    rng = np.random.default_rng([seed, index])
    canvas, levels = (kind or SHAPES).draw(rng, size)
    canvas = blur(canvas, rng.uniform(0.3, 0.9))
    canvas = (canvas - 128) * np.float32(rng.uniform(0.75, 1.1)) + np.float32(128 + rng.uniform(-20, 20))
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(1, 7))
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), [mask for labels in levels for mask in split_labels(labels)])


def split_labels(labels: np.ndarray) -> list[np.ndarray]:
    """Return one mask (H x W, bool) for each label that shows enough of itself, in the order of the labels."""
    areas = np.bincount(labels.ravel())
    core_areas = np.bincount(labels[~find_borders(labels)], minlength=len(areas))
    min_area = min(MIN_AREA_FRACTION * labels.size, MIN_AREA_PIXELS)
    is_kept = (areas >= min_area) & (core_areas >= MIN_CORE_FRACTION * areas)
    return [labels == label for label in range(1, len(areas)) if is_kept[label]]


def render_shapes(rng: np.random.Generator, size: tuple[int, int], scale: float = 1.0) -> Drawn:
    """Draw dead leaves: textured shapes, the later ones over the earlier ones; smaller and more of them by `scale`."""
    weight, labels = np.float32(render_pattern(rng, size)), np.zeros(size, np.int32)
    side, count = scale * np.sqrt(np.prod(size)), round(rng.integers(12, 36) / scale)
    radii = side * np.exp(rng.uniform(np.log(0.05), np.log(0.26), count))
    # Roughly the larger ones first: in a random order, the last few would hide most of the others.
    radii = radii[np.argsort(-radii * rng.uniform(0.4, 2.5, len(radii)))]
    for label, radius in enumerate(radii, start=1):
        outline = turn(render_outline(rng), rng.uniform(0, 2 * np.pi))
        box, inside = fill(radius * outline + rng.random(2) * size[::-1], size)
        labels[box][inside] = label
        weight[box][inside] = render_pattern(rng, inside.shape)[inside]
    colours = rng.uniform(40, 215, (len(radii) + 1, 1)) + rng.normal(0, 35, (len(radii) + 1, 3))
    others = colours + rng.normal(0, 40, (len(radii) + 1, 1)) + rng.normal(0, 20, colours.shape)
    return mix(colours, others, labels, weight), [labels]


def render_outline(rng: np.random.Generator) -> np.ndarray:
    """Return a polygon (K x 2, XY) about as large as the unit circle."""
    circle, corners, x = point_at(np.linspace(0, 2 * np.pi, 48)), rng.integers(3, 8), np.linspace(-1.4, 1.4, 24)
    spikes = point_at(np.arange(2 * corners) * np.pi / corners)
    outlines = {
        "ellipse": lambda: circle * [1, rng.uniform(0.4, 1)],
        "polygon": lambda: point_at((np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners),
        "star": lambda: spikes * np.tile([1.1, rng.uniform(0.4, 0.7)], corners)[:, None],
        "rectangle": lambda: SQUARE * [0.9, rng.uniform(0.25, 0.9)],
        # The way in to the hole and back lies inside the ring, so one polygon is enough.
        "ring": lambda: np.vstack([circle, circle[::-1] * rng.uniform(0.4, 0.7)]),
        "stroke": lambda: widen(
            np.stack([x, rng.uniform(-0.6, 0.6) * x**2 + rng.uniform(-0.6, 0.6) * x**3], axis=1), rng.uniform(0.1, 0.2)
        ),
    }
    return outlines[rng.choice(list(outlines))]()


def render_pattern(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return the share of a second colour in each pixel (H x W, bool or float32) of a plain or patterned surface."""
    (along, across), period = turn_grid(size, rng.uniform(0, 2 * np.pi)), rng.uniform(4, 16)
    patterns = {
        "flat": lambda: np.zeros(size, np.float32),
        "gradient": lambda: (along - along.min()) / max(np.ptp(along), 1),
        "noise": lambda: render_noise(rng, size, period / 5),
        "stripes": lambda: render_lines(along, period, period / 2),
        "hatching": lambda: render_lines(along, period, 1.5),
        "checkers": lambda: render_lines(along, period, period / 2) ^ render_lines(across, period, period / 2),
    }
    return patterns[rng.choice(list(patterns))]()


def render_facades(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw rows of windows in a wall of bricks or plaster; doors, shutters, ledges and shrubs belong to no object."""
    (height, width), angle, labels = size, rng.normal(0, 0.05), np.zeros(size, np.int32)
    canvas = render_wall(rng, size, angle)

    def paint(centre: np.ndarray, half: np.ndarray, shape: np.ndarray, colour: np.ndarray) -> Area:
        """Paint a shape (K x 2, XY) around a point of the wall, from its middle, before it is turned."""
        box, inside = fill(turn(shape * half + centre, angle) + np.array(size[::-1]) / 2, size)
        canvas[box][inside] = colour
        return box, inside

    colours = [rng.choice(each) + rng.normal(0, 10, 3) for each in (FRAMES, WALLS, PAINTS)]
    bars = rng.integers((0, 0), (3, 4))  # between panes: upright, level
    outline, has_shutters = ARCH if rng.random() < 0.3 else SQUARE, rng.random() < 0.4
    floors, columns = rng.integers(3, 5), rng.integers(3, 6)
    cell = np.array([width / columns, height / floors]) * rng.uniform(0.9, 1.15)
    half = cell * rng.uniform([0.2, 0.26], [0.3, 0.36])
    for floor in range(-1, floors + 1):
        if rng.random() < 0.4:  # a ledge
            paint([0, (floor - floors / 2 + 1) * cell[1]], 1, SQUARE * [width, 0.02 * cell[1]], colours[1])
        for column in range(-1, columns + 1):
            centre = (np.array([column, floor]) + 0.5 - np.array([columns, floors]) / 2) * cell
            if rng.random() < 0.06:
                continue
            if rng.random() < 0.08:  # a door
                paint(centre, 1, SQUARE * half * [0.8, 1.2], rng.choice(PAINTS))
                continue
            box, inside = render_window(rng, partial(paint, centre, half), outline, colours[: 2 + has_shutters], bars)
            labels[box][inside] = labels.max() + 1
    for _ in range(rng.integers(0, 3)):
        shrub = point_at(np.linspace(0, 2 * np.pi, 32)) * min(size) * rng.uniform(0.06, 0.16, 2)
        box, inside = fill(shrub + [rng.random() * width, height * rng.uniform(0.85, 1)], size)
        inside &= render_noise(rng, inside.shape, 2.5) > 0.15
        leaves = np.float32((74, 100, 52)) * (0.6 + 0.8 * render_noise(rng, inside.shape, 1.2)[..., None])
        canvas[box][inside] = leaves[inside]
        labels[box][inside] = 0
    across, _ = turn_grid(size, rng.uniform(0, 2 * np.pi))
    light = 1 + 0.25 * np.sin(across / max(size) * 3 + rng.uniform(0, 6))
    return canvas * np.float32(light)[..., None], [labels]


def render_wall(rng: np.random.Generator, size: tuple[int, int], angle: float) -> np.ndarray:
    """Return plaster or bricks (H x W x 3, float32)."""
    canvas = np.float32(rng.choice(WALLS) + rng.normal(0, 8, 3))
    canvas = canvas + (14 * (render_noise(rng, size, 6) - 0.5) + 8 * (render_noise(rng, size, 0.8) - 0.5))[..., None]
    if rng.random() < 0.7:
        (along, up), course = turn_grid(size, angle), rng.uniform(5, 11)
        row = np.floor(up / course)
        shifted = along + (row % 2) * course
        brick = (np.int64(np.floor(shifted / (2 * course))) * 7919 + np.int64(row) * 104729) % 997
        canvas += ((brick / 997 - 0.5) * np.float32(rng.uniform(10, 40)))[..., None]
        mortar = render_lines(up, course, 1.3) | render_lines(shifted, 2 * course, 1.3)
        canvas[mortar] = 0.35 * canvas[mortar] + 0.65 * np.float32((200, 195, 185))
    return np.float32(canvas)


def render_window(
    rng: np.random.Generator,
    paint: Callable[..., Area],
    outline: np.ndarray,
    colours: list[np.ndarray],
    bars: np.ndarray,
) -> Area:
    """Paint a window and what surrounds it, shapes (K x 2, XY) in halves of its sides, and return where it is."""
    frame, trim, *shutters = colours
    for side, shutter in product((-1, 1), shutters):
        paint(SQUARE * [0.35, 1] + [1.4 * side, 0], shutter)
        for slat in np.linspace(-0.9, 0.9, 10):
            paint(SQUARE * [0.3, 0.02] + [1.4 * side, slat], 0.7 * shutter)
    paint(outline * 1.12, trim)
    paint(SQUARE * [1.25, 0.06] + [0, 1.1], trim)
    area = paint(outline, frame)
    glass = rng.uniform(35, 120) * np.array([0.85, 1.0, 1.15]) + rng.normal(0, 10, 3)
    paint(outline * 0.86, glass)
    if rng.random() < 0.6:  # curtains
        for side in (-1, 1):
            paint(SQUARE * [rng.uniform(0.1, 0.3), 0.7] + [0.55 * side, 0.1], glass + rng.uniform(30, 120))
    if rng.random() < 0.5:  # the sky in it
        paint(np.array([[-0.8, -0.2], [-0.1, -0.8], [0.4, -0.8], [-0.8, 0.4]]), glass + rng.uniform(20, 80))
    for place in np.linspace(-1, 1, bars[0] + 2)[1:-1]:
        paint(SQUARE * [0.05, 0.9] + [0.86 * place, 0], frame)
    for place in np.linspace(-1, 1, bars[1] + 2)[1:-1]:
        paint(SQUARE * [0.9, 0.04] + [0, 0.86 * place], frame)
    return area


def fill(polygon: np.ndarray, size: tuple[int, int]) -> Area:
    """Return the box of a polygon (K x 2, XY) and the mask in it (h x w, bool), often far smaller than the image."""
    low = np.clip(np.floor(polygon.min(axis=0)), 0, np.array(size[::-1]) - 1).astype(int)
    high = np.clip(np.ceil(polygon.max(axis=0)) + 1, low + 1, size[::-1]).astype(int)
    return np.s_[low[1] : high[1], low[0] : high[0]], rasterize(polygon - low, tuple(high - low)[::-1])


def widen(line: np.ndarray, half_width: float) -> np.ndarray:
    """Return the polygon (2K x 2, XY) of a band along a line (K x 2, XY)."""
    steps = np.gradient(line, axis=0)
    aside = half_width * turn(steps, np.pi / 2) / np.hypot(*steps.T)[:, None]
    return np.vstack([line + aside, (line - aside)[::-1]])


def point_at(angle: float | np.ndarray) -> np.ndarray:
    """Return the points of the unit circle (... x 2, XY) at angles in radians."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def turn(points: np.ndarray, angle: float) -> np.ndarray:
    """Rotate points (K x 2, XY) about the origin by radians."""
    x_axis = point_at(angle)
    return points @ np.stack([x_axis, x_axis[::-1] * [-1, 1]])


def turn_grid(size: tuple[int, int], angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the two coordinates (each H x W, float32, pixels) of every pixel on axes turned by radians."""
    y, x = np.float32(np.arange(size[0])[:, None]), np.float32(np.arange(size[1]))
    cosine, sine = np.float32(point_at(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def render_noise(rng: np.random.Generator, size: tuple[int, int], sigma: float) -> np.ndarray:
    """Return smooth noise (H x W, float32) of mean 0.5 and deviation 0.3, with grains of about `sigma` pixels."""
    # Blurring white noise divides its deviation by 2 sqrt(pi) sigma.
    return 0.5 + 0.3 * 2 * math.sqrt(math.pi) * sigma * blur(rng.standard_normal(size, np.float32), sigma)


def render_lines(axis: np.ndarray, period: float, width: float) -> np.ndarray:
    """Return where a coordinate (H x W, float32) is on lines, `width` of every `period` pixels (H x W, bool)."""
    cycles = axis / np.float32(period)  # np.floor costs a tenth of the % operator
    return cycles - np.floor(cycles) < np.float32(width / period)


def mix(colours: np.ndarray, others: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return an image (H x W x 3, float32) between two colours for each label (L x 3), weighted by pixel (H x W)."""
    colours, others = np.float32(colours), np.float32(others - colours)
    return others.take(labels, axis=0) * np.float32(weight)[..., None] + colours.take(labels, axis=0)


def find_borders(labels: np.ndarray) -> np.ndarray:
    """Return the pixels (H x W, bool) beside a pixel of another label, lines two pixels wide."""
    across = np.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 1)))
    down = np.pad(labels[1:] != labels[:-1], ((1, 1), (0, 0)))
    return across[:, 1:] | across[:, :-1] | down[1:] | down[:-1]


# A rectangle with a round top, within the square from -1 to 1.
ARCH = np.vstack([point_at(np.linspace(np.pi, 2 * np.pi, 24)) * [1, 0.5] + [0, -0.5], [[1, 1], [-1, 1]]])
SHAPES = Kind("shape", render_shapes)
FACADES = Kind("window", render_facades)
