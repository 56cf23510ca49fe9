"""Draw what photographs show: lit bodies of one or of many colours, some with limbs, before a ground of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from finestsam.data.synthetic import Box, Drawn, fill, point_at, turn, turn_grid
from finestsam.images.frames import blur
from finestsam.masks import distance_inside, rasterize
from recipes.builtin_weights.bodies import Polygon, Species, sample_lump, sample_species
from recipes.builtin_weights.surfaces import render_fractal, sample_surface, sharpen


@dataclass
class Pose:
    """Where a body is."""

    radius: float  # pixels
    centre: np.ndarray  # XY, pixels
    angle: float
    mirror: np.ndarray  # (1 or -1, 1)

    def place(self, polygon: Polygon) -> Polygon:
        """Return a polygon of a species in the image's pixels."""
        return turn(polygon * self.mirror, self.angle) * self.radius + self.centre


@dataclass
class Painting:
    """An image in the making."""

    canvas: np.ndarray  # H x W x 3, float32
    wholes: np.ndarray  # H x W, int32: labels of bodies
    parts: np.ndarray  # H x W, int32: labels of their parts
    light: float  # the angle that it comes from
    body_count: int = 0
    part_count: int = 0


def render_scenery(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Draw bodies before a ground: first the whole ones, then the parts that differ from the rest of their body."""
    side, light = math.sqrt(math.prod(size)), rng.uniform(0, 2 * np.pi)
    mood = rng.normal(0, 1, 3) * [8, 4, 12]  # the colour of the light
    painting = Painting(render_ground(rng, size), np.zeros(size, np.int32), np.zeros(size, np.int32), light)
    kinds = [sample_species(rng) for _ in range(rng.integers(1, 5))]
    count, largest = (rng.integers(2, 9), 0.42) if rng.random() < 0.6 else (rng.integers(8, 30), 0.16)
    radii = np.sort(side * np.exp(rng.uniform(math.log(0.3 * largest), math.log(largest), count)))
    for number, radius in enumerate(radii, start=1):
        kind = kinds[rng.integers(len(kinds))] if rng.random() < 0.6 else sample_species(rng)
        # What is nearer is larger, lower and in front.
        place = rng.random(2) * [1, 0.6] + [0, 0.4 * rng.random() * number / count + 0.1]
        angle = rng.normal(0, 0.25) if rng.random() < 0.7 else rng.uniform(0, 2 * np.pi)
        paint_body(rng, painting, kind, Pose(radius, place * size[::-1], angle, np.array([rng.choice((-1, 1)), 1])))
    canvas = painting.canvas + np.float32(mood)
    along, _ = turn_grid(size, light)
    canvas *= np.float32(1 + rng.uniform(0, 0.25) * np.sin(along / side * 2))[..., None]
    if rng.random() < 0.25:  # the shade of leaves
        shade = sharpen(render_fractal(rng, size, side / 5, 1.6), 4)
        canvas *= (1 - np.float32(rng.uniform(0.2, 0.45)) * shade)[..., None]
    return canvas, [painting.wholes, painting.parts]


def paint_body(rng: np.random.Generator, painting: Painting, kind: Species, pose: Pose) -> None:
    """Paint a body and its shadow over what is there, in place."""
    outlines = [[pose.place(polygon) for polygon in part] for part in kind.parts]
    everything = np.vstack([polygon for part in outlines for polygon in part])
    box, around = fill(everything, painting.wholes.shape)
    corner, shape = _corner(box), around.shape
    inside, which = np.zeros(shape, bool), np.zeros(shape, np.int32)
    for number, part in enumerate(outlines):
        for polygon in part:
            covered = rasterize(polygon - corner, shape)
            inside |= covered
            which[covered] = number
    if not inside.any():
        return
    surfaces = list(kind.surfaces)
    if kind.bands:
        down = (np.indices(shape)[::-1].transpose(1, 2, 0) + corner - pose.centre) @ point_at(pose.angle + np.pi / 2)
        cuts = np.sort(rng.uniform(-0.5, 0.6, kind.bands)) * pose.radius
        which = np.searchsorted(cuts, down).astype(np.int32)
        surfaces += [sample_surface(rng) for _ in range(kind.bands)]
    _cast_shadow(rng, painting, everything, pose)
    skin = np.zeros((*shape, 3), np.float32)
    for number in np.unique(which[inside]):
        surface = surfaces[number]
        shown = surface.show(rng, shape, max(1.0, surface.grain * pose.radius / 100))
        skin = np.where((which == number)[..., None], shown, skin)
    for polygon, colour in kind.features:
        skin[rasterize(pose.place(polygon) - corner, shape)] = colour
    skin *= find_light(inside, kind.relief, painting.light, pose.radius)[..., None]
    painting.body_count += 1
    painting.canvas[box][inside] = skin[inside]
    painting.wholes[box][inside], painting.parts[box][inside] = painting.body_count, 0
    if kind.has_parts:
        painting.parts[box][inside] = painting.part_count + 1 + which[inside]
        painting.part_count += 1 + int(which.max())


def _cast_shadow(rng: np.random.Generator, painting: Painting, outline: Polygon, pose: Pose) -> None:
    if rng.random() < 0.4:
        return
    (left, _), (right, bottom) = outline.min(axis=0), outline.max(axis=0)
    half_width = 0.55 * (right - left)
    foot = np.array([(left + right) / 2 - 0.2 * pose.radius * math.cos(painting.light), bottom])
    spot = point_at(np.linspace(0, 2 * np.pi, 32)) * half_width * [1, rng.uniform(0.1, 0.3)] + foot
    softness = max(0.5, 0.1 * pose.radius)
    frame = np.array([spot.min(axis=0) - 3 * softness, spot.max(axis=0) + 3 * softness])
    box, around = fill(frame, painting.wholes.shape)
    shadow = blur(np.float32(rasterize(spot - _corner(box), around.shape)), softness)
    painting.canvas[box] *= (1 - np.float32(rng.uniform(0.2, 0.6)) * shadow)[..., None]


def _corner(box: Box) -> np.ndarray:
    return np.array([box[1].start, box[0].start])


def find_light(inside: np.ndarray, relief: float, light: float, radius: float) -> np.ndarray:
    """Return how bright each pixel of a body (H x W, bool) is, as a body as round as `relief` lit from an angle is."""
    if relief == 0:
        return np.ones(inside.shape, np.float32)
    depth = distance_inside(inside)
    reach = max(depth.max(), 1.0)
    depth = np.clip(depth / reach, 0, 1)
    height = blur(reach * np.sqrt(depth * (2 - depth)), max(0.8, 0.06 * radius))
    down, across = np.gradient(height) if min(inside.shape) > 1 else (np.zeros_like(height), np.zeros_like(height))
    cosine, sine = np.float32(point_at(light))
    facing = (1 - cosine * across - sine * down) / np.sqrt(1 + across**2 + down**2)
    return np.float32(1 + relief * np.clip(facing - 0.85, -0.7, 0.4))


def render_ground(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return what the bodies are before (H x W x 3, float32): one to three stretches, out of focus or not."""
    side = math.sqrt(math.prod(size))
    canvas, edge = np.zeros((*size, 3), np.float32), -math.inf
    rows = np.float32(np.arange(size[0]))[:, None]
    for stretch in range(rng.integers(1, 4)):
        wave = side * rng.choice((0, 0, 0.02, 0.08)) * (render_fractal(rng, (1, size[1]), side / 4, 2) - 0.5)
        edge = size[0] * rng.uniform(0.1, 0.4) + max(edge, 0) if stretch else -math.inf
        below = rows + wave >= edge
        surface = sample_surface(rng)
        shown = surface.show(rng, size, side * math.exp(rng.uniform(math.log(0.004), math.log(0.15))))
        fade = np.float32(rng.normal(0, 25)) * (rows / size[0] - 0.5)
        canvas = np.where(below[..., None], shown + fade[..., None], canvas)
    if rng.random() < 0.4:
        return canvas
    for _ in range(rng.integers(0, 16)):  # what is of no interest, out of focus
        reach = side * rng.uniform(0.01, 0.12)
        polygon = sample_lump(rng, 0.3) * reach * rng.uniform(0.4, 1, 2) + rng.random(2) * size[::-1]
        box, inside = fill(polygon, size)
        canvas[box][inside] += np.float32(rng.normal(0, 30) + rng.normal(0, 10, 3))
    return blur(canvas, side * math.exp(rng.uniform(math.log(0.006), math.log(0.03))))
