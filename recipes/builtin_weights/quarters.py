"""Draw a quarter of an old town: large blocks built up around courts, gardens with beds, and a river with its quays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from finestsam.data.synthetic import (
    SQUARE,
    Drawn,
    fill,
    find_borders,
    render_lines,
    render_noise,
    turn,
    turn_grid,
    widen,
)
from finestsam.masks import find_components
from recipes.builtin_weights.town_plans import (
    INWARDS,
    PAPER,
    RED,
    render_beds,
    render_stains,
    render_tracks,
    soften,
    split_edges,
    subdivide,
    to_quad,
    write_names,
)

BARE, HATCHED, DOTTED, WATER = range(4)  # how an engraver fills an area


@dataclass
class Layout:
    """The areas of a plan so far, the later ones over the earlier ones."""

    labels: np.ndarray  # H x W, int32
    angle: float  # of the plan, in radians
    fillings: list[int] = field(default_factory=lambda: [BARE])  # of each label; street is 0

    def add(self, outline: np.ndarray, filling: int) -> None:
        """Add an area (K x 2, XY, about the middle of the image, before the plan is turned)."""
        size = self.labels.shape
        self.fillings.append(filling)
        box, inside = fill(turn(outline, self.angle) + np.array(size[::-1]) / 2, size)
        self.labels[box][inside] = len(self.fillings) - 1


def render_quarters(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw a few large blocks, bare, built up or planted, in half of the plans beside a river; words cross them all.

    Every area that lines enclose is an object, with holes where others lie in it; the streets are none.
    """
    layout = Layout(np.zeros(size, np.int32), rng.normal(0, 0.4))
    block_area = size[0] * size[1] * np.exp(rng.uniform(np.log(0.05), np.log(0.45)))
    for block in subdivide(rng, SQUARE[::2] * 0.65 * max(size), block_area):
        _add_block(rng, layout, block + INWARDS * max(size) * rng.uniform(0.005, 0.03))
    if rng.random() < 0.5:
        _add_river(rng, layout)
    _, areas = find_components(~find_borders(layout.labels))  # a river may have cut a block in two
    return _engrave(rng, layout), [np.where(layout.labels == 0, 0, areas)]


def _add_block(rng: np.random.Generator, layout: Layout, block: np.ndarray) -> None:
    """Add a block (2 x 2: two opposite corners, XY), in some plans with a pavement, and what stands on it."""
    side, roundness = max(layout.labels.shape), rng.choice([0, rng.uniform(0.03, 0.3)])
    skew = rng.normal(0, 0.03, (4, 2)).clip(-0.06, 0.06) * min(side, 4 * np.ptp(block, axis=0).min())
    if rng.random() < 0.4:
        pavement = block - INWARDS * side * rng.uniform(0.008, 0.02)
        layout.add(split_edges(soften(to_quad(pavement, block, skew), roundness)), BARE)
    use = rng.choice(("bare", "houses", "courts", "garden"))
    whole = {"courts": HATCHED, "garden": rng.choice((BARE, DOTTED))}.get(use, BARE)
    layout.add(split_edges(soften(to_quad(block, block, skew), roundness)), whole)
    if use == "bare":
        return
    part_area = np.ptp(block, axis=0).prod() * rng.uniform(0.06, 0.4)
    for part in subdivide(rng, block, part_area):
        if rng.random() < 0.25:
            continue
        inner = part + INWARDS * np.ptp(part, axis=0) * rng.uniform(*((0, 0.1) if use == "houses" else (0.06, 0.3)))
        filling = {"houses": HATCHED, "courts": BARE, "garden": DOTTED if whole == BARE else BARE}[use]
        layout.add(to_quad(inner, block, skew), filling)
    if use == "garden" and rng.random() < 0.5:
        for bed in render_beds(rng, block):
            layout.add(to_quad(block, block, skew).mean(axis=0) + bed, rng.choice((HATCHED, DOTTED)))


def _add_river(rng: np.random.Generator, layout: Layout) -> None:
    """Add a river along or across the streets, sometimes with an island, between quays."""
    side, across = max(layout.labels.shape), rng.choice([0, np.pi / 2])
    x, (slope, curve), level = np.linspace(-0.9, 0.9, 24), rng.normal(0, 0.08, 2), rng.uniform(-0.4, 0.4)
    middle = np.stack([x, level + slope * x + curve * x**2], axis=1)
    half_width = rng.uniform(0.03, 0.11)
    if rng.random() < 0.5:
        layout.add(turn(widen(middle, half_width + rng.uniform(0.01, 0.04)), across) * side, BARE)  # its quays
    layout.add(turn(widen(middle, half_width), across) * side, WATER)
    if half_width > 0.06 and rng.random() < 0.5:
        tip = np.array([[-1, 0.3], [-0.6, 1], [0.7, 1], [1, 0], [0.6, -1], [-0.7, -1]]) * [0.25, 0.4 * half_width]
        layout.add(turn(tip + [rng.uniform(-0.4, 0.4), level], across) * side, rng.choice((BARE, DOTTED)))


def _engrave(rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """Return the plan in ink on stained paper (H x W x 3, float32): outlines, fillings, and what crosses them."""
    size, ink = layout.labels.shape, rng.uniform(20, 90) * np.array([1, 0.95, 0.85])
    paper = np.array(PAPER) + rng.normal(0, 12, 3)
    along, across = turn_grid(size, layout.angle + rng.choice([-1, 1]) * np.pi / 4)
    canvas = np.float32(paper) + np.float32(6 * render_stains(rng, along, across))[..., None]
    period, flow = rng.uniform(2.5, 6), rng.uniform(4, 10)
    strokes = render_lines(along, period, rng.uniform(0.35, 0.6) * period)
    dots = render_noise(rng, size, rng.uniform(0.8, 1.5)) > rng.uniform(0.7, 0.9)
    x, y = turn_grid(size, layout.angle + rng.choice([0, np.pi / 2]))
    ripples = y + rng.uniform(0, 3) * flow * np.sin(x / max(size) * rng.uniform(4, 25)).astype(np.float32)
    waves = render_lines(ripples, flow, rng.uniform(1, 1.6))
    fillings = np.array(layout.fillings)[layout.labels]
    is_inked = ((fillings == HATCHED) & strokes) | ((fillings == DOTTED) & dots) | ((fillings == WATER) & waves)
    canvas += (is_inked * np.float32(rng.uniform(0.5, 0.9)))[..., None] * np.float32(ink - paper)
    canvas[find_borders(layout.labels)] = ink
    render_tracks(rng, canvas, rng.choice([ink, RED]))
    for letters in ((0.015, 0.04), (0.03, 0.1))[: rng.integers(1, 3)]:
        write_names(rng, canvas, ink, layout.angle + rng.choice([0, np.pi / 2]), letters)
    return canvas
