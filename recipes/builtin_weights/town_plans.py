"""Draw old town plans: washed parcels, and engraved blocks with their pavements, buildings and gardens."""

from __future__ import annotations

import numpy as np

from finestsam.data.synthetic import (
    SQUARE,
    Drawn,
    fill,
    find_borders,
    mix,
    point_at,
    render_lines,
    render_noise,
    turn,
    turn_grid,
    widen,
)

INWARDS = np.array([[1.0], [-1.0]])  # for the two opposite corners, XY, that make a rectangle
PAPER = (232, 222, 196)
RED = np.array([180, 60, 45])
WASHES = ((238, 200, 185), (226, 178, 158), (240, 226, 178), (205, 216, 178), (200, 212, 214), (206, 142, 126), PAPER)


def render_parcels(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
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


def render_plans(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw an engraved plan: on bare paper, blocks of houses in outline, their pavements, buildings and flower beds.

    A block is what the buildings and beds in it leave of it, a pavement the band around its block; a line of ink
    belongs to nothing. Words, rails and borders cross the plan and are no objects.
    """
    angle = rng.normal(0, 0.4)
    labels, is_hatched = lay_out_blocks(rng, size, angle)
    borders, ink = find_borders(labels), rng.uniform(20, 90) * np.array([1, 0.95, 0.85])
    along, across = turn_grid(size, angle + rng.choice([-1, 1]) * np.pi / 4)
    period = rng.uniform(2.5, 6)
    strokes = render_lines(along, period, rng.uniform(0.35, 0.6) * period)
    strokes = (strokes & render_lines(across, period, period / 2)) if rng.random() < 0.2 else strokes
    paper = np.array(PAPER) + rng.normal(0, 12, 3)
    canvas = np.float32(paper) + np.float32(6 * render_stains(rng, along, across))[..., None]
    hatching = (is_hatched[labels] & strokes) * np.float32(rng.uniform(0.5, 0.9))
    canvas += hatching[..., None] * np.float32(ink - paper)
    canvas[borders] = ink
    second_ink = rng.choice([ink, RED])
    render_tracks(rng, canvas, second_ink)
    for words_ink in (ink, *rng.choice([ink, second_ink], rng.integers(0, 3))):
        write_names(rng, canvas, words_ink, angle + rng.choice([0, np.pi / 2]))
    return canvas, [np.where(borders, 0, labels)]


def lay_out_blocks(rng: np.random.Generator, size: tuple[int, int], angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of an engraved plan turned by radians (H x W, int32), and of each whether it is hatched."""
    area, side, middle = size[0] * size[1], max(size), np.array(size[::-1]) / 2
    swing, frequency, phase = rng.uniform(0, 0.03) * side, rng.uniform(1, 6), rng.uniform(0, 6)
    labels, is_hatched = np.zeros(size, np.int32), [False]
    block_area, building_area = area * rng.uniform(0.05, 0.35), area * rng.uniform(0.008, 0.04)
    has_pavements, roundness = rng.random() < 0.5, rng.choice([0, rng.uniform(0.05, 0.3)])
    for block in subdivide(rng, SQUARE[::2] * 0.65 * side, block_area):
        block = block + INWARDS * side * rng.uniform(0.01, 0.04)
        # No corner moves so far that a small block folds over.
        skew = rng.normal(0, 0.03, (4, 2)).clip(-0.06, 0.06) * min(side, 4 * np.ptp(block, axis=0).min())
        pavement, corners = block - INWARDS * side * rng.uniform(0.008, 0.02), to_quad(block, block, skew)
        # Each with the chance that it is hatched; None: another wing of the building before it.
        outlines = [(soften(to_quad(pavement, block, skew), roundness), 0.0)] if has_pavements else []
        outlines.append((soften(corners, roundness), 0.1))
        if rng.random() < 0.15:
            outlines += [(corners.mean(axis=0) + bed, 0.8) for bed in render_beds(rng, block)]
        else:
            buildings = choose_buildings(rng, block, building_area)
            outlines += [(to_quad(part, block, skew), 1.0 if rng.random() < 0.6 else None) for part in buildings]
        for outline, hatched_share in outlines:
            if hatched_share is not None:
                is_hatched.append(rng.random() < hatched_share)
            points = split_edges(outline)
            points = points + swing * np.sin(frequency * points[:, ::-1] / side + phase)  # streets are not straight
            box, inside = fill(turn(points, angle) + middle, size)
            labels[box][inside] = len(is_hatched) - 1
    return labels, np.array(is_hatched)


def split_edges(polygon: np.ndarray, count: int = 8) -> np.ndarray:
    """Return a polygon (K x 2, XY) with points between its corners, `count` K in all."""
    steps = np.arange(count)[:, None] / count
    following = np.roll(polygon, -1, axis=0)
    return (polygon[:, None] + steps * (following - polygon)[:, None]).reshape(-1, 2)


def soften(polygon: np.ndarray, roundness: float) -> np.ndarray:
    """Return a polygon (K x 2, XY) whose corners are rounded off from this share of the shorter side."""
    if roundness == 0:
        return polygon
    before, after = np.roll(polygon, 1, axis=0) - polygon, np.roll(polygon, -1, axis=0) - polygon
    radius = roundness * min(np.hypot(*before.T))
    starts = polygon + before * (radius / np.hypot(*before.T))[:, None]
    ends = polygon + after * (radius / np.hypot(*after.T))[:, None]
    share = np.linspace(0, 1, 6)[:, None]
    curves = (1 - share) ** 2 * starts[:, None] + 2 * share * (1 - share) * polygon[:, None] + share**2 * ends[:, None]
    return curves.reshape(-1, 2)


def render_beds(rng: np.random.Generator, block: np.ndarray) -> list[np.ndarray]:
    """Return flower beds (each K x 2, XY, about the middle of a block): wavy shapes inside it."""
    angles, beds = np.linspace(0, 2 * np.pi, 12, endpoint=False), []
    for _ in range(rng.integers(3, 9)):
        radii = np.ptp(block, axis=0).min() * rng.uniform(0.06, 0.2) * rng.uniform(0.7, 1.3, (12, 1))
        outline = turn(point_at(angles) * radii * [1, rng.uniform(0.35, 1)], rng.uniform(0, np.pi))
        beds.append(outline + rng.uniform(-0.35, 0.35, 2) * np.ptp(block, axis=0))
    return beds


def render_tracks(rng: np.random.Generator, canvas: np.ndarray, ink: np.ndarray) -> None:
    """Draw what crosses a plan over everything and is no object, in place: borders in dashes, rails, thick lines."""
    size = canvas.shape[:2]
    for _ in range(rng.integers(0, 4)):
        x, (slope, curve) = np.linspace(-0.8, 0.8, 24), rng.normal(0, 0.2, 2)
        line = turn(np.stack([x, slope * x + curve * x**2 + rng.uniform(-0.5, 0.5)], axis=1), rng.uniform(0, np.pi))
        angle, period = rng.uniform(0, np.pi), rng.uniform(8, 20) if rng.random() < 0.6 else None
        polygon = widen(line, rng.choice([0.0015, 0.0015, 0.008])) * max(size) + np.array(size[::-1]) / 2
        box, inside = fill(polygon, size)
        if period is not None:
            inside &= ~render_lines(turn_grid(size, angle)[0][box], period, 6)
        canvas[box][inside] = ink


def choose_buildings(rng: np.random.Generator, block: np.ndarray, building_area: float) -> list[np.ndarray]:
    """Return the rectangles (each 2 x 2: two opposite corners, XY) in a block that are built on; some have none."""
    if rng.random() < 0.3:
        return []
    yard = block + INWARDS * np.ptp(block, axis=0) * rng.uniform(0.0, 0.15, (2, 2))
    return [part for part in subdivide(rng, yard, building_area) if rng.random() < 0.5]


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
    rows, columns = (render_lines(axis, rng.uniform(4, 7), 1.3) for axis in (along, across))
    drawn = (has_rows[labels] & rows) | (has_columns[labels] & columns) | (has_dots[labels] & rows & columns)
    stains = 8 * render_stains(rng, along, across)
    return mix(tints, ink[None].repeat(count, 0), labels, 0.6 * drawn) + stains[..., None]


def render_stains(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Return how much lighter old paper is in each pixel (H x W), grains and waves along two coordinates together."""
    return render_noise(rng, along.shape, 0.8) + np.sin(along / 40) * np.sin(across / 50) / 2


def write_names(
    rng: np.random.Generator,
    canvas: np.ndarray,
    ink: np.ndarray,
    angle: float,
    heights: tuple[float, float] = (0.02, 0.06),
) -> None:
    """Write words of made-up letters over the canvas, in place; they belong to no object and cut none.

    Args:
        heights: the least and the greatest of a letter, as shares of the longer side.
    """
    height, width = size = canvas.shape[:2]
    nodes = np.array([[0, 0], [0.6, 0], [0, 0.5], [0.6, 0.5], [0, 1], [0.6, 1]])
    for letter_count in rng.integers(1, 9, rng.integers(4, 9)):
        letter_height, start = max(size) * rng.uniform(*heights), rng.uniform(0, 0.9, 2) * (width, height)
        for number in range(letter_count):
            strokes = rng.permutation(nodes)[:4] + [0.9 * number, 0]
            box, inside = fill(turn(widen(strokes, 0.06) * letter_height, angle) + start, size)
            canvas[box][inside] = ink
