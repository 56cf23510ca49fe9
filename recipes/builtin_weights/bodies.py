"""Draw the outlines and the looks of bodies: stones, fruit, creatures, vessels, boxes, furniture, plants."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from finestsam.data.synthetic import SQUARE, point_at, turn, widen
from recipes.builtin_weights.surfaces import Surface, sample_colour, sample_surface

FACES = (1.1, 0.7, 0.9)  # how bright the faces of a box are: top, flank, front

Polygon = np.ndarray  # K x 2, XY
Part = list[Polygon]  # all of them together


@dataclass
class Species:
    """What the bodies of one kind have in common; outlines about as large as the unit circle."""

    parts: list[Part]  # drawn in this order
    surfaces: list[Surface]  # of each part
    relief: float  # 0: flat, 1: round
    bands: int = 0  # cuts across it, each with a surface of its own
    features: list[tuple[Polygon, np.ndarray]] = field(default_factory=list)  # small marks and their colours

    @property
    def has_parts(self) -> bool:
        """Whether its parts can be told apart."""
        return self.bands > 0 or any(surface is not self.surfaces[0] for surface in self.surfaces)


def sample_species(rng: np.random.Generator) -> Species:
    """Draw a kind of body."""
    draw = SPECIES[rng.choice(len(SPECIES), p=SHARES)]
    parts = draw(rng)
    surfaces = [sample_surface(rng)] * len(parts)
    relief, bands = rng.choice((0, 0.5, 1), p=(0.2, 0.4, 0.4)), 0
    if rng.random() < 0.6:
        surfaces = [sample_surface(rng) if rng.random() < 0.5 else surface for surface in surfaces]
    if draw is _sample_box:  # its faces are flat, and each is lit in its own way
        surfaces, relief = [surface.dim(shade) for surface, shade in zip(surfaces, FACES, strict=True)], 0
    elif rng.random() < 0.2:
        surfaces, bands = surfaces[:1], int(rng.integers(1, 4))
    kind = Species(parts, surfaces, relief, bands)
    for _ in range(rng.integers(0, 8) if rng.random() < 0.5 else 0):
        mark = sample_lump(rng, 0.2) * rng.uniform(0.02, 0.12) + rng.uniform(-0.5, 0.5, 2)
        kind.features.append((mark, np.float32(sample_colour(rng))))
    return kind


def sample_lump(rng: np.random.Generator, roughness: float, corners: int = 64) -> Polygon:
    """Return a closed curve about the unit circle whose waves weaken with their number."""
    angles, waves = np.linspace(0, 2 * np.pi, corners, endpoint=False), np.arange(2, 9)[:, None]
    heights = rng.normal(0, roughness, (7, 1)) / waves * np.cos(waves * angles + rng.uniform(0, 2 * np.pi, (7, 1)))
    return point_at(angles) * np.exp(heights.sum(axis=0))[:, None]


def _render_stone(rng: np.random.Generator) -> list[Part]:
    return [[sample_lump(rng, rng.uniform(0.05, 0.7)) * [1, rng.uniform(0.4, 1)]]]


def _render_fruit(rng: np.random.Generator) -> list[Part]:
    stalk = widen(np.stack([np.linspace(0, rng.normal(0, 0.3), 6), np.linspace(-0.6, -1.2, 6)], axis=1), 0.06)
    return [[stalk], [sample_lump(rng, 0.12) * [0.9, rng.uniform(0.7, 0.95)]]]


def _render_creature(rng: np.random.Generator) -> list[Part]:
    """A trunk with a head and limbs, upright or on all fours."""
    upright = rng.random() < 0.5
    length, girth = rng.uniform(0.45, 0.6), rng.uniform(0.2, 0.34)
    trunk = sample_lump(rng, 0.12) * ([girth, length] if upright else [length, girth])
    limbs = []
    for foot in range(rng.integers(2, 5)):
        start = np.array([girth if upright else length, length if upright else girth]) * [rng.uniform(-0.8, 0.8), 0.5]
        if upright and foot >= 2:  # an arm
            start = np.array([rng.choice((-1, 1)) * girth * 0.8, -0.6 * length])
        end = start + [rng.normal(0, 0.25) + 0.3 * np.sign(start[0]) * (foot >= 2), rng.uniform(0.4, 0.75)]
        limbs.append(sample_limb(rng, start, end, rng.uniform(0.07, 0.13)))
    head_at = np.array([0, -length - 0.15]) if upright else np.array([length + 0.1, -girth - rng.uniform(0, 0.3)])
    head = sample_lump(rng, 0.15) * rng.uniform(0.16, 0.28) * [1, rng.uniform(0.7, 1.3)] + head_at
    neck = sample_limb(rng, 0.6 * head_at, head_at, 0.1)
    parts = [limbs, [trunk, neck], [head]]
    if not upright and rng.random() < 0.7:
        tail = np.array([-length, -0.3 * girth])
        parts[0].append(sample_limb(rng, tail, tail + [-0.4, rng.normal(0, 0.3)], 0.05))
    return [[0.85 * polygon for polygon in part] for part in parts]


def sample_limb(rng: np.random.Generator, start: np.ndarray, end: np.ndarray, half_width: float) -> Polygon:
    """Return a bent band from a point to another that is narrower at its end."""
    share = np.linspace(0, 1, 10)[:, None]
    aside = turn((end - start)[None], np.pi / 2) * rng.normal(0, 0.15)
    line = start + share * (end - start) + 4 * share * (1 - share) * aside
    return widen(line, half_width * (1 - 0.5 * share))


def _render_vessel(rng: np.random.Generator) -> list[Part]:
    """A body of revolution seen from the side, with or without a handle and a foot."""
    along = np.linspace(-1, 1, 24)
    knots = rng.uniform(0.15, 0.6, 5)
    radius = np.interp(along, np.linspace(-1, 1, 5), knots)
    radius = np.convolve(np.pad(radius, 2, mode="edge"), np.full(5, 0.2), mode="valid")
    profile = np.stack([radius, along], axis=1)
    body = np.vstack([profile, (profile * [-1, 1])[::-1]])
    parts = [[body]]
    if rng.random() < 0.5:
        ring = point_at(np.linspace(-0.6 * np.pi, 0.6 * np.pi, 20)) * [0.35, 0.4]
        parts.insert(0, [widen(ring + [radius[10], 0], rng.uniform(0.04, 0.09))])
    if rng.random() < 0.5:
        cut = rng.integers(3, 9)
        parts.append([np.vstack([profile[:cut], (profile[:cut] * [-1, 1])[::-1]])])
    return parts


def _sample_box(rng: np.random.Generator) -> list[Part]:
    """A box seen from a corner: two or three faces."""
    width, height, depth = rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.5)
    aside, up = np.array([width, rng.uniform(-0.25, 0.1)]), np.array([0.0, -height])
    back = np.array([-depth, -rng.uniform(0.05, 0.35)])
    corner = np.array([-0.2, 0.5])
    front = np.array([corner, corner + aside, corner + aside + up, corner + up])
    top = np.array([corner + up, corner + up + aside, corner + up + aside + back, corner + up + back])
    flank = np.array([corner, corner + up, corner + up + back, corner + back])
    return [[top], [flank], [front]]


def _render_furniture(rng: np.random.Generator) -> list[Part]:
    """A board or a seat on legs, or wheels below a body."""
    width, thickness, level = rng.uniform(0.6, 1), rng.uniform(0.05, 0.4), rng.uniform(-0.4, 0.2)
    board = _round_off(SQUARE * [width, thickness]) + [0, level]
    if rng.random() < 0.5:
        legs = []
        for foot in np.linspace(-0.85, 0.85, rng.integers(2, 5)) * width:
            lean = rng.normal(0, 0.08)
            legs.append(widen(np.array([[foot, level], [foot + lean, 0.9]]), rng.uniform(0.03, 0.08)))
        parts = [legs, [board]]
    else:
        wheel = rng.uniform(0.15, 0.3)
        places = np.linspace(-0.65, 0.65, 2) * width
        wheels = [point_at(np.linspace(0, 2 * np.pi, 32)) * wheel + [x, level + thickness] for x in places]
        parts = [[board], wheels]
    if rng.random() < 0.5:  # a back or a cabin
        narrow = rng.uniform(0.2, 0.8) * width
        top = np.array([[-narrow, level], [narrow, level], [0.7 * narrow, level - 0.6], [-0.9 * narrow, level - 0.6]])
        parts.insert(0, [_round_off(top)])
    return parts


def _round_off(polygon: Polygon) -> Polygon:
    """Return a polygon with its corners cut twice (Chaikin's rule)."""
    for _ in range(2):
        following = np.roll(polygon, -1, axis=0)
        polygon = np.stack([0.85 * polygon + 0.15 * following, 0.15 * polygon + 0.85 * following], axis=1)
        polygon = polygon.reshape(-1, 2)
    return polygon


def _render_plant(rng: np.random.Generator) -> list[Part]:
    """Leaves on stems from one foot."""
    leaves, stems = [], []
    for _ in range(rng.integers(3, 12)):
        lean = rng.normal(0, 0.5)
        tip = np.array([math.sin(lean), 1 - 1.7 * math.cos(lean)]) * rng.uniform(0.6, 1)
        stems.append(sample_limb(rng, np.array([0.0, 0.9]), tip, 0.035))
        leaf = sample_lump(rng, 0.15) * [rng.uniform(0.1, 0.25), rng.uniform(0.2, 0.45)]
        leaves.append(turn(leaf, lean + rng.normal(0, 0.3)) + tip)
    return [stems, leaves]


SPECIES = (
    _render_stone,
    _render_fruit,
    _render_creature,
    _render_vessel,
    _sample_box,
    _render_furniture,
    _render_plant,
)
SHARES = (0.2, 0.1, 0.25, 0.13, 0.12, 0.12, 0.08)
