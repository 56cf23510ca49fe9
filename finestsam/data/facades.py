"""Draw house fronts, whose objects are the windows: what the built-in weights have not seen, for the demo to teach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finestsam.data.drawing import SQUARE, Drawn, fill, point_at, render_lines, render_noise, turn, turn_grid

WALLS = ((164, 92, 72), (186, 120, 90), (214, 196, 160), (196, 178, 150), (226, 216, 200), (150, 150, 152))
FRAMES = ((236, 234, 226), (222, 206, 176), (92, 66, 48), (54, 74, 66))
PAINTS = ((58, 92, 76), (112, 54, 44), (70, 86, 120), (122, 92, 62))
LEAVES = (74, 100, 52)


@dataclass
class Style:
    """What the windows of one house have in common; lengths as shares of the window's half sides."""

    frame: np.ndarray  # colours, RGB
    trim: np.ndarray
    shutter: np.ndarray
    bars: tuple[int, int]  # between panes: upright, level
    is_arched: bool
    has_shutters: bool


def render_facades(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw rows of windows in a wall of bricks or plaster; doors, shutters, ledges and shrubs belong to no object."""
    height, width = size
    angle, middle = rng.normal(0, 0.05), np.array(size[::-1]) / 2
    canvas, labels, label = render_wall(rng, size, angle), np.zeros(size, np.int32), 0
    style = _choose_style(rng)
    floors, columns = rng.integers(3, 5), rng.integers(3, 6)
    cell = np.array([width / columns, height / floors]) * rng.uniform(0.9, 1.15)
    half = cell * rng.uniform([0.2, 0.26], [0.3, 0.36])
    for floor in range(-1, floors + 1):
        ledge = (floor - floors / 2 + 1) * cell[1]
        if rng.random() < 0.4:
            _paint(canvas, SQUARE * [width, 0.02 * cell[1]] + [0, ledge], style.trim, angle, middle)
        for column in range(-1, columns + 1):
            centre = (np.array([column, floor]) + 0.5 - np.array([columns, floors]) / 2) * cell
            if rng.random() < 0.06:
                continue
            if rng.random() < 0.08:
                _paint(canvas, SQUARE * half * [0.8, 1.2] + centre, rng.choice(PAINTS), angle, middle)
                continue
            label += 1
            outline = render_window(rng, canvas, style, half, centre, angle, middle)
            box, inside = fill(outline, size)
            labels[box][inside] = label
    for _ in range(rng.integers(0, 3)):
        shrub = point_at(np.linspace(0, 2 * np.pi, 32)) * min(size) * rng.uniform(0.06, 0.16, 2)
        box, inside = fill(shrub + [rng.random() * width, height * rng.uniform(0.85, 1)], size)
        inside &= render_noise(rng, inside.shape, 2.5) > 0.15
        canvas[box][inside] = (np.float32(LEAVES) * (0.6 + 0.8 * render_noise(rng, inside.shape, 1.2)[..., None]))[
            inside
        ]
        labels[box][inside] = 0
    across, _ = turn_grid(size, rng.uniform(0, 2 * np.pi))
    light = 1 + 0.25 * np.sin(across / max(size) * 3 + rng.uniform(0, 6))
    return canvas * np.float32(light)[..., None], [labels]


def render_wall(rng: np.random.Generator, size: tuple[int, int], angle: float) -> np.ndarray:
    """Return plaster or bricks (H x W x 3, float32)."""
    colour = np.float32(rng.choice(WALLS) + rng.normal(0, 8, 3))
    stains, grains = render_noise(rng, size, 6), render_noise(rng, size, 0.8)
    canvas = colour + (14 * (stains - 0.5) + 8 * (grains - 0.5))[..., None]
    if rng.random() < 0.7:
        along, up = turn_grid(size, angle)
        course = rng.uniform(5, 11)
        row = np.floor(up / course)
        shifted = along + (row % 2) * course
        brick = (np.int64(np.floor(shifted / (2 * course))) * 7919 + np.int64(row) * 104729) % 997
        canvas += ((brick / 997 - 0.5) * np.float32(rng.uniform(10, 40)))[..., None]
        mortar = render_lines(up, course, 1.3) | render_lines(shifted, 2 * course, 1.3)
        canvas[mortar] = 0.35 * canvas[mortar] + 0.65 * np.float32((200, 195, 185))
    return np.float32(canvas)


def render_window(
    rng: np.random.Generator,
    canvas: np.ndarray,
    style: Style,
    half: np.ndarray,
    centre: np.ndarray,
    angle: float,
    middle: np.ndarray,
) -> np.ndarray:
    """Paint a window with what surrounds it, in place, and return its outline in the image (K x 2, XY).

    Args:
        half: half its width and height, pixels.
        centre: of the window, from the middle of the image, pixels, before the wall is turned by `angle`.
    """

    def paint(shape: np.ndarray, colour: np.ndarray) -> None:
        _paint(canvas, shape * half + centre, colour, angle, middle)

    outline = _arch() if style.is_arched else SQUARE
    if style.has_shutters:
        for side in (-1, 1):
            paint(SQUARE * [0.35, 1] + [1.4 * side, 0], style.shutter)
            for slat in np.linspace(-0.9, 0.9, 10):
                paint(SQUARE * [0.3, 0.02] + [1.4 * side, slat], 0.7 * style.shutter)
    paint(outline * 1.12, style.trim)
    paint(SQUARE * [1.25, 0.06] + [0, 1.1], style.trim)
    paint(outline, style.frame)
    glass = rng.uniform(35, 120) * np.array([0.85, 1.0, 1.15]) + rng.normal(0, 10, 3)
    paint(outline * 0.86, glass)
    if rng.random() < 0.6:  # curtains
        for side in (-1, 1):
            paint(SQUARE * [rng.uniform(0.1, 0.3), 0.7] + [0.55 * side, 0.1], glass + rng.uniform(30, 120))
    if rng.random() < 0.5:  # the sky in it
        paint(np.array([[-0.8, -0.2], [-0.1, -0.8], [0.4, -0.8], [-0.8, 0.4]]), glass + rng.uniform(20, 80))
    upright, level = style.bars
    for place in np.linspace(-1, 1, upright + 2)[1:-1]:
        paint(SQUARE * [0.05, 0.9] + [0.86 * place, 0], style.frame)
    for place in np.linspace(-1, 1, level + 2)[1:-1]:
        paint(SQUARE * [0.9, 0.04] + [0, 0.86 * place], style.frame)
    return turn(outline * half + centre, angle) + middle


def _choose_style(rng: np.random.Generator) -> Style:
    frame, trim, shutter = (np.array(rng.choice(each)) + rng.normal(0, 10, 3) for each in (FRAMES, WALLS, PAINTS))
    bars = int(rng.integers(0, 3)), int(rng.integers(0, 4))
    return Style(frame, trim, shutter, bars, bool(rng.random() < 0.3), bool(rng.random() < 0.4))


def _arch() -> np.ndarray:
    """Return a rectangle with a round top (K x 2, XY), within the square from -1 to 1."""
    top = point_at(np.linspace(np.pi, 2 * np.pi, 24)) * [1, 0.5] + [0, -0.5]
    return np.vstack([top, [[1, 1], [-1, 1]]])


def _paint(canvas: np.ndarray, shape: np.ndarray, colour: np.ndarray, angle: float, middle: np.ndarray) -> None:
    box, inside = fill(turn(shape, angle) + middle, canvas.shape[:2])
    canvas[box][inside] = colour
