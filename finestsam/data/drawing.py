"""Draw the kinds of scenes: textured shapes, things with parts, cells under a microscope; and what all kinds draw with.

Each kind draws a canvas (H x W x 3, float32, 0 to 255) and label maps (each H x W, int: 0 is background, k the k-th
object), one for each level of detail.
"""

from __future__ import annotations

import math

import numpy as np

from finestsam.images.frames import blur
from finestsam.masks import rasterize

SQUARE = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])  # the order of the corners of a quad
FLUORESCENT = [
    [[8, 12, 14], [90, 215, 120]],
    [[10, 8, 22], [100, 130, 245]],
    [[14, 12, 12], [225, 220, 215]],
    [[8, 8, 8], [60, 60, 60]],
    [[10, 10, 10], [110, 110, 110]],
]
STAINED = [[[238, 226, 232], [176, 120, 178]], [[232, 228, 215], [190, 105, 110]], [[146, 148, 142], [84, 88, 84]]]

Box = tuple[slice, slice]  # rows and columns of an image
Drawn = tuple[np.ndarray, list[np.ndarray]]  # a canvas and its label maps


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
    circle, corners = point_at(np.linspace(0, 2 * np.pi, 48)), rng.integers(3, 8)
    match rng.choice(("ellipse", "polygon", "star", "rectangle", "ring", "stroke")):
        case "ellipse":
            return circle * [1, rng.uniform(0.4, 1)]
        case "polygon":
            return point_at((np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners)
        case "star":
            reach = np.tile([1.1, rng.uniform(0.4, 0.7)], corners)
            return point_at(np.arange(2 * corners) * np.pi / corners) * reach[:, None]
        case "rectangle":
            return SQUARE * [0.9, rng.uniform(0.25, 0.9)]
        case "ring":
            # The way in to the hole and back lies inside the ring, so one polygon is enough.
            return np.vstack([circle, circle[::-1] * rng.uniform(0.4, 0.7)])
        case _:
            x, (bend, swing) = np.linspace(-1.4, 1.4, 24), rng.uniform(-0.6, 0.6, 2)
            return widen(np.stack([x, bend * x**2 + swing * x**3], axis=1), rng.uniform(0.1, 0.2))


def render_pattern(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return the share of a second colour in each pixel (H x W, bool or float32) of a plain or patterned surface."""
    along, across = turn_grid(size, rng.uniform(0, 2 * np.pi))
    period = rng.uniform(4, 16)
    match rng.choice(("flat", "gradient", "noise", "stripes", "hatching", "checkers")):
        case "flat":
            return np.zeros(size, np.float32)
        case "gradient":
            return (along - along.min()) / max(np.ptp(along), 1)
        case "noise":
            return render_noise(rng, size, period / 5)
        case "stripes":
            return render_lines(along, period, period / 2)
        case "hatching":
            return render_lines(along, period, 1.5)
        case _:
            return render_lines(along, period, period / 2) ^ render_lines(across, period, period / 2)


def render_things(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw shaded things with parts, more alike than `render_shapes` does: first the whole ones, then the parts."""
    weight, wholes, parts = np.float32(render_pattern(rng, size)), np.zeros(size, np.int32), np.zeros(size, np.int32)
    paint, count = np.zeros(size, np.int32), int(rng.integers(8, 28))
    radii = np.sort(np.sqrt(np.prod(size)) * np.exp(rng.uniform(np.log(0.06), np.log(0.3), count)))[::-1]
    shade = np.ones(size, np.float32)
    for label, radius in enumerate(radii, start=1):
        outline, centre = turn(render_outline(rng), rng.uniform(0, 2 * np.pi)), rng.random(2) * size[::-1]
        box, inside = fill(radius * outline + centre, size)
        wholes[box][inside], parts[box][inside], paint[box][inside] = label, 0, 2 * label - 1
        weight[box][inside] = 0.6 * np.float32(render_pattern(rng, inside.shape)[inside])
        along, _ = turn_grid(inside.shape, rng.uniform(0, 2 * np.pi))
        light = 1 + rng.uniform(0, 0.35) * (along - along.mean()) / max(np.ptp(along), 1)
        shade[box][inside] = light[inside]
        if rng.random() < 0.5:
            inner = turn(render_outline(rng), rng.uniform(0, 2 * np.pi)) * radius * rng.uniform(0.25, 0.55)
            box, inside = fill(inner + centre + rng.normal(0, 0.15, 2) * radius, size)
            inside &= wholes[box] == label
            parts[box][inside], paint[box][inside] = label, 2 * label
            weight[box][inside] = 0.6 * np.float32(render_pattern(rng, inside.shape)[inside])
    spread, middle = rng.uniform(18, 55), rng.uniform(70, 170)
    colours = middle + rng.normal(0, spread, (2 * len(radii) + 1, 1)) + rng.normal(0, 0.5 * spread, (1, 3))
    colours = colours + rng.normal(0, 0.6 * spread, (2 * len(radii) + 1, 3))
    others = colours + rng.normal(0, 25, (len(colours), 1)) + rng.normal(0, 10, colours.shape)
    return mix(colours, others, paint, weight) * shade[..., None], [wholes, parts]


def render_blobs(rng: np.random.Generator, size: tuple[int, int], scale: float = 1.0) -> Drawn:
    """Draw cells under a microscope, smaller and more by `scale`: they touch, and an earlier one stops a later one."""
    labels, depths = np.zeros(size, np.int32), np.zeros(size, np.float32)
    mean_radius = scale * np.sqrt(np.prod(size)) * np.exp(rng.uniform(np.log(0.035), np.log(0.1)))
    centres = [rng.random(2) * size[::-1]]
    for label in range(1, round(rng.integers(20, 80) / scale)):
        centre, radius = rng.random(2) * size[::-1], mean_radius * np.exp(rng.normal(0, 0.25))
        if rng.random() < 0.6:  # beside an earlier one, which makes clusters
            centre = centres[rng.integers(len(centres))] + 1.9 * mean_radius * point_at(rng.uniform(0, 2 * np.pi))
        box, depth = render_cell(rng, centre, radius, size)
        inside = (depth > 0) & (labels[box] == 0)
        if inside.sum() > 0.7 * (depth > 0).sum():
            labels[box][inside] = label
            depths[box][inside] = depth[inside]
            centres.append(centre)
    return stain(rng, labels, depths), [labels]


def render_cell(
    rng: np.random.Generator, centre: np.ndarray, radius: float, size: tuple[int, int]
) -> tuple[Box, np.ndarray]:
    """Return the box of a wavy disk and the depth in it (h x w, float32): 1 at the centre, 0 at the outline."""
    angles, lobes = np.arange(128) * np.pi / 64, np.arange(2, 6)[:, None]
    waves = rng.normal(0, 0.2, (4, 1)) / lobes * np.cos(lobes * angles + rng.uniform(0, 2 * np.pi, (4, 1)))
    radii = (radius * np.exp(waves.sum(axis=0))).astype(np.float32)
    box, _ = fill(centre + radii[:, None] * point_at(angles), size)
    y, x = np.ogrid[box]
    x, y = np.float32(x - centre[0]), np.float32(y - centre[1])
    return box, 1 - np.hypot(x, y) / radii[np.int32(np.arctan2(y, x) * 64 / np.pi) % 128]


def stain(rng: np.random.Generator, labels: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Colour cells on a background (H x W x 3, float32) from their labels and the depth inside them (H x W)."""
    count, is_fluorescent = labels.max() + 1, rng.random() < 0.5
    background, colour = rng.choice(FLUORESCENT if is_fluorescent else STAINED) + rng.normal(0, 8, (2, 3))
    colours = background + rng.uniform(0.6, 1.1, (count, 1)) * (colour - background)
    colours[0] = background
    seams = blur(np.float32(find_borders(labels)), 0.8)
    weight = 0.6 + 0.5 * render_noise(rng, labels.shape, rng.uniform(1, 3))
    if is_fluorescent:
        weight *= 0.3 + 0.7 * np.sqrt(depth * (2 - depth)) - 0.3 * seams
    else:
        nuclei = np.clip(8 * (depth - np.float32(rng.uniform(0.4, 0.6))), 0, 1)
        weight += 0.5 * nuclei + np.float32(rng.uniform(0.2, 0.7)) * seams
    along, across = turn_grid(labels.shape, rng.uniform(0, 2 * np.pi))
    light = 1 + 0.2 * np.sin(along / max(labels.shape) * 3) * np.cos(across / max(labels.shape) * 2)
    canvas = mix(np.tile(background, (count, 1)), colours, labels, weight) * light[..., None]
    return blur(canvas, rng.uniform(0.3, 1.2))


def fill(polygon: np.ndarray, size: tuple[int, int]) -> tuple[Box, np.ndarray]:
    """Return the box of a polygon (K x 2, XY) and the mask in it (h x w, bool), often far smaller than the image."""
    (left, top), (right, bottom) = np.floor(polygon.min(axis=0)), np.ceil(polygon.max(axis=0)) + 1
    height, width = size
    left, top = min(max(int(left), 0), width - 1), min(max(int(top), 0), height - 1)
    right, bottom = min(max(int(right), left + 1), width), min(max(int(bottom), top + 1), height)
    return np.s_[top:bottom, left:right], rasterize(polygon - (left, top), (bottom - top, right - left))


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
    canvas = np.float32(others - colours).take(labels, axis=0)
    canvas *= weight[..., None].astype(np.float32)
    canvas += np.float32(colours).take(labels, axis=0)
    return canvas


def find_borders(labels: np.ndarray) -> np.ndarray:
    """Return the pixels (H x W, bool) beside a pixel of another label, lines two pixels wide."""
    borders = np.zeros(labels.shape, bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    borders[:, 1:] |= across
    borders[:, :-1] |= across
    borders[1:] |= down
    borders[:-1] |= down
    return borders
