"""Draw the kinds of scenes: textured shapes, parcels and blocks of old plans, cells under a microscope, things.

Each kind draws a canvas (H x W x 3, float32, 0 to 255) and label maps (each H x W, int: 0 is background, k the k-th
object), one for each level of detail.
"""

from __future__ import annotations

import math

import numpy as np

from finestsam.images import blur
from finestsam.masks import rasterize

SQUARE = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])  # the order of the corners of a quad
INWARDS = np.array([[1.0], [-1.0]])  # for the two opposite corners, XY, that make a rectangle
PAPER = (232, 222, 196)
WASHES = ((238, 200, 185), (226, 178, 158), (240, 226, 178), (205, 216, 178), (200, 212, 214), (206, 142, 126), PAPER)
FLUORESCENT = [
    [[8, 12, 14], [90, 215, 120]],
    [[10, 8, 22], [100, 130, 245]],
    [[14, 12, 12], [225, 220, 215]],
    [[8, 8, 8], [60, 60, 60]],
    [[10, 10, 10], [110, 110, 110]],
]
STAINED = [[[238, 226, 232], [176, 120, 178]], [[232, 228, 215], [190, 105, 110]], [[146, 148, 142], [84, 88, 84]]]

Box = tuple[slice, slice]  # rows and columns of a picture
Drawn = tuple[np.ndarray, list[np.ndarray]]  # a canvas and its label maps


def draw_shapes(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw dead leaves: textured shapes, the later ones over the earlier ones."""
    weight, labels = np.float32(draw_pattern(rng, size)), np.zeros(size, np.int32)
    radii = np.sqrt(np.prod(size)) * np.exp(rng.uniform(np.log(0.05), np.log(0.26), rng.integers(12, 36)))
    # Roughly the larger ones first: in a random order, the last few would hide most of the others.
    radii = radii[np.argsort(-radii * rng.uniform(0.4, 2.5, len(radii)))]
    for label, radius in enumerate(radii, start=1):
        outline = turn(draw_outline(rng), rng.uniform(0, 2 * np.pi))
        box, inside = fill(radius * outline + rng.random(2) * size[::-1], size)
        labels[box][inside] = label
        weight[box][inside] = draw_pattern(rng, inside.shape)[inside]
    colours = rng.uniform(40, 215, (len(radii) + 1, 1)) + rng.normal(0, 35, (len(radii) + 1, 3))
    others = colours + rng.normal(0, 40, (len(radii) + 1, 1)) + rng.normal(0, 20, colours.shape)
    return mix(colours, others, labels, weight), [labels]


def draw_outline(rng: np.random.Generator) -> np.ndarray:
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


def draw_pattern(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return the share of a second colour in each pixel (H x W, bool or float32) of a plain or patterned surface."""
    along, across = turn_grid(size, rng.uniform(0, 2 * np.pi))
    period = rng.uniform(4, 16)
    match rng.choice(("flat", "gradient", "noise", "stripes", "hatching", "checkers")):
        case "flat":
            return np.zeros(size, np.float32)
        case "gradient":
            return (along - along.min()) / max(np.ptp(along), 1)
        case "noise":
            return draw_noise(rng, size, period / 5)
        case "stripes":
            return draw_lines(along, period, period / 2)
        case "hatching":
            return draw_lines(along, period, 1.5)
        case _:
            return draw_lines(along, period, period / 2) ^ draw_lines(across, period, period / 2)


def draw_parcels(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw an old town plan: blocks between streets, cut into parcels, washed, inked and lettered."""
    area, angle, reach = size[0] * size[1], rng.normal(0, 0.25), 0.65 * max(size)
    labels, label = np.zeros(size, np.int32), 0
    block_area, parcel_area = area * rng.uniform(0.15, 0.5), area * rng.uniform(0.06, 0.13)
    for block in subdivide(rng, SQUARE[::2] * reach, block_area):
        block = block + INWARDS * max(size) * rng.uniform(0.01, 0.03)  # half a street on each side
        skew = rng.normal(0, 0.03, (4, 2)) * max(size)
        for parcel in subdivide(rng, block, parcel_area):
            yard = parcel + INWARDS * np.ptp(parcel, axis=0) * rng.uniform(0.15, 0.4, (2, 2))
            for rectangle in (parcel, yard)[: 1 + (rng.random() < 0.2)]:
                label += 1
                box, inside = fill(turn(to_quad(rectangle, block, skew), angle) + np.array(size[::-1]) / 2, size)
                labels[box][inside] = label
    borders = find_borders(labels)
    ink = rng.uniform(30, 90) * np.array([1, 0.85, 0.7])
    canvas = wash(rng, labels, ink)
    canvas[borders] = ink
    write_names(rng, canvas, ink, angle)
    return canvas, [np.where(borders, 0, labels)]


def draw_plans(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw an engraved plan: on bare paper, blocks of houses in outline, and in them buildings that are hatched.

    A block is what its buildings leave of it; a line of ink belongs to nothing.
    """
    area, angle, reach = size[0] * size[1], rng.normal(0, 0.4), 0.65 * max(size)
    labels, is_hatched = np.zeros(size, np.int32), [False]
    block_area, building_area = area * rng.uniform(0.05, 0.35), area * rng.uniform(0.008, 0.04)
    for block in subdivide(rng, SQUARE[::2] * reach, block_area):
        block = block + INWARDS * max(size) * rng.uniform(0.01, 0.04)
        skew, middle = rng.normal(0, 0.03, (4, 2)) * max(size), np.array(size[::-1]) / 2
        outlines = [(block, True)] + [(part, False) for part in choose_buildings(rng, block, building_area)]
        for rectangle, starts in outlines:
            if starts or rng.random() < 0.6:  # else another wing of the last building
                is_hatched.append(not starts or rng.random() < 0.1)
            box, inside = fill(turn(to_quad(rectangle, block, skew), angle) + middle, size)
            labels[box][inside] = len(is_hatched) - 1
    borders, ink = find_borders(labels), rng.uniform(20, 90) * np.array([1, 0.95, 0.85])
    along, across = turn_grid(size, angle + rng.choice([-1, 1]) * np.pi / 4)
    period = rng.uniform(2.5, 6)
    strokes = draw_lines(along, period, rng.uniform(0.35, 0.6) * period)
    strokes = (strokes & draw_lines(across, period, period / 2)) if rng.random() < 0.2 else strokes
    paper = np.array(PAPER) + rng.normal(0, 12, 3)
    stains = 6 * (draw_noise(rng, size, 0.8) + np.sin(along / 40) * np.sin(across / 50) / 2)
    canvas = np.float32(paper) + np.float32(stains)[..., None]
    hatching = (np.array(is_hatched)[labels] & strokes) * np.float32(rng.uniform(0.5, 0.9))
    canvas += hatching[..., None] * np.float32(ink - paper)
    canvas[borders] = ink
    for _ in range(rng.integers(1, 4)):
        write_names(rng, canvas, ink, angle + rng.choice([0, np.pi / 2]))
    return canvas, [np.where(borders, 0, labels)]


def choose_buildings(rng: np.random.Generator, block: np.ndarray, building_area: float) -> list[np.ndarray]:
    """Return the rectangles (each 2 x 2: two opposite corners, XY) in a block that are built on; some have none."""
    if rng.random() < 0.3:
        return []
    yard = block + INWARDS * np.ptp(block, axis=0) * rng.uniform(0.0, 0.15, (2, 2))
    return [part for part in subdivide(rng, yard, building_area) if rng.random() < 0.5]


def draw_things(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw shaded things with parts, more alike than `draw_shapes` does: first the whole ones, then the parts."""
    weight, wholes, parts = np.float32(draw_pattern(rng, size)), np.zeros(size, np.int32), np.zeros(size, np.int32)
    paint, count = np.zeros(size, np.int32), int(rng.integers(8, 28))
    radii = np.sort(np.sqrt(np.prod(size)) * np.exp(rng.uniform(np.log(0.06), np.log(0.3), count)))[::-1]
    shade = np.ones(size, np.float32)
    for label, radius in enumerate(radii, start=1):
        outline, centre = turn(draw_outline(rng), rng.uniform(0, 2 * np.pi)), rng.random(2) * size[::-1]
        box, inside = fill(radius * outline + centre, size)
        wholes[box][inside], parts[box][inside], paint[box][inside] = label, 0, 2 * label - 1
        weight[box][inside] = 0.6 * np.float32(draw_pattern(rng, inside.shape)[inside])
        along, _ = turn_grid(inside.shape, rng.uniform(0, 2 * np.pi))
        light = 1 + rng.uniform(0, 0.35) * (along - along.mean()) / max(np.ptp(along), 1)
        shade[box][inside] = light[inside]
        if rng.random() < 0.5:
            inner = turn(draw_outline(rng), rng.uniform(0, 2 * np.pi)) * radius * rng.uniform(0.25, 0.55)
            box, inside = fill(inner + centre + rng.normal(0, 0.15, 2) * radius, size)
            inside &= wholes[box] == label
            parts[box][inside], paint[box][inside] = label, 2 * label
            weight[box][inside] = 0.6 * np.float32(draw_pattern(rng, inside.shape)[inside])
    spread, middle = rng.uniform(18, 55), rng.uniform(70, 170)
    colours = middle + rng.normal(0, spread, (2 * len(radii) + 1, 1)) + rng.normal(0, 0.5 * spread, (1, 3))
    colours = colours + rng.normal(0, 0.6 * spread, (2 * len(radii) + 1, 3))
    others = colours + rng.normal(0, 25, (len(colours), 1)) + rng.normal(0, 10, colours.shape)
    return mix(colours, others, paint, weight) * shade[..., None], [wholes, parts]


def subdivide(rng: np.random.Generator, rectangle: np.ndarray, max_area: float) -> list[np.ndarray]:
    """Cut a rectangle (2 x 2: its two opposite corners, XY) until every piece is below about `max_area`."""
    sides = np.ptp(rectangle, axis=0)
    if sides.prod() < max_area * rng.uniform(0.4, 1.4):
        return [rectangle]
    first, second = rectangle.copy(), rectangle.copy()
    axis = int(np.argmax(sides * rng.uniform(0.7, 1.4, 2)))
    first[1, axis] = second[0, axis] = rectangle[0, axis] + sides[axis] * rng.uniform(0.35, 0.65)
    return subdivide(rng, first, max_area) + subdivide(rng, second, max_area)


def to_quad(rectangle: np.ndarray, block: np.ndarray, skew: np.ndarray) -> np.ndarray:
    """Return the corners (4 x 2, XY) of a rectangle, drawn along as the corners of its block move by `skew` (4 x 2)."""
    corners = np.where(SQUARE < 0, rectangle[0], rectangle[1])
    position = 2 * (corners - block[0]) / np.ptp(block, axis=0) - 1  # -1 to 1 across the block
    # Bilinear, so straight lines along the block's sides stay straight and neighbours stay flush.
    return corners + ((1 + position[:, None] * SQUARE) / 2).prod(axis=2) @ skew


def wash(rng: np.random.Generator, labels: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Return stained paper (H x W x 3, float32) with a tint for each label, and hatching or dots on some."""
    count = labels.max() + 1
    tints = rng.choice(WASHES, count) + rng.normal(0, 6, (count, 3))
    has_rows, has_columns, has_dots = rng.integers(6, size=count) == [[0], [1], [2]]
    tints[0], has_rows[0], has_columns[0], has_dots[0] = PAPER, False, False, False
    along, across = turn_grid(labels.shape, rng.uniform(0, np.pi))
    rows, columns = (draw_lines(axis, rng.uniform(4, 7), 1.3) for axis in (along, across))
    drawn = (has_rows[labels] & rows) | (has_columns[labels] & columns) | (has_dots[labels] & rows & columns)
    stains = 8 * (draw_noise(rng, labels.shape, 0.8) + np.sin(along / 40) * np.sin(across / 50) / 2)
    return mix(tints, ink[None].repeat(count, 0), labels, 0.6 * drawn) + stains[..., None]


def write_names(rng: np.random.Generator, canvas: np.ndarray, ink: np.ndarray, angle: float) -> None:
    """Write words of made-up letters over the canvas, in place; they belong to no object and cut none."""
    height, width = size = canvas.shape[:2]
    nodes = np.array([[0, 0], [0.6, 0], [0, 0.5], [0.6, 0.5], [0, 1], [0.6, 1]])
    for letter_count in rng.integers(1, 9, rng.integers(4, 9)):
        letter_height, start = max(size) * rng.uniform(0.02, 0.06), rng.uniform(0, 0.9, 2) * (width, height)
        for number in range(letter_count):
            strokes = rng.permutation(nodes)[:4] + [0.9 * number, 0]
            box, inside = fill(turn(widen(strokes, 0.06) * letter_height, angle) + start, size)
            canvas[box][inside] = ink


def draw_blobs(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw cells under a microscope: they touch, and an earlier one stops a later one."""
    labels, depths = np.zeros(size, np.int32), np.zeros(size, np.float32)
    mean_radius = np.sqrt(np.prod(size)) * np.exp(rng.uniform(np.log(0.035), np.log(0.1)))
    centres = [rng.random(2) * size[::-1]]
    for label in range(1, rng.integers(20, 80)):
        centre, radius = rng.random(2) * size[::-1], mean_radius * np.exp(rng.normal(0, 0.25))
        if rng.random() < 0.6:  # beside an earlier one, which makes clusters
            centre = centres[rng.integers(len(centres))] + 1.9 * mean_radius * point_at(rng.uniform(0, 2 * np.pi))
        box, depth = draw_cell(rng, centre, radius, size)
        inside = (depth > 0) & (labels[box] == 0)
        if inside.sum() > 0.7 * (depth > 0).sum():
            labels[box][inside] = label
            depths[box][inside] = depth[inside]
            centres.append(centre)
    return stain(rng, labels, depths), [labels]


def draw_cell(
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
    weight = 0.6 + 0.5 * draw_noise(rng, labels.shape, rng.uniform(1, 3))
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
    """Return the box of a polygon (K x 2, XY) and the mask in it (h x w, bool), often far smaller than the picture."""
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


def draw_noise(rng: np.random.Generator, size: tuple[int, int], sigma: float) -> np.ndarray:
    """Return smooth noise (H x W, float32) of mean 0.5 and deviation 0.3, with grains of about `sigma` pixels."""
    # Blurring white noise divides its deviation by 2 sqrt(pi) sigma.
    return 0.5 + 0.3 * 2 * math.sqrt(math.pi) * sigma * blur(rng.standard_normal(size, np.float32), sigma)


def draw_lines(axis: np.ndarray, period: float, width: float) -> np.ndarray:
    """Return where a coordinate (H x W, float32) is on lines, `width` of every `period` pixels (H x W, bool)."""
    cycles = axis / np.float32(period)  # np.floor costs a tenth of the % operator
    return cycles - np.floor(cycles) < np.float32(width / period)


def mix(colours: np.ndarray, others: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return a picture (H x W x 3, float32) between two colours for each label (L x 3), weighted by pixel (H x W)."""
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
