"""Draw shaded things with parts, and cells under a microscope.

Each kind draws a canvas (H x W x 3, float32, 0 to 255) and label maps (each H x W, int: 0 is background, k the k-th
object), one for each level of detail.
"""

from __future__ import annotations

import numpy as np

from finestsam.data.synthetic import (
    Box,
    Drawn,
    fill,
    find_borders,
    mix,
    point_at,
    render_noise,
    render_outline,
    render_pattern,
    turn,
    turn_grid,
)
from finestsam.images.frames import blur

FLUORESCENT = [
    [[8, 12, 14], [90, 215, 120]],
    [[10, 8, 22], [100, 130, 245]],
    [[14, 12, 12], [225, 220, 215]],
    [[8, 8, 8], [60, 60, 60]],
    [[10, 10, 10], [110, 110, 110]],
]
STAINED = [[[238, 226, 232], [176, 120, 178]], [[232, 228, 215], [190, 105, 110]], [[146, 148, 142], [84, 88, 84]]]


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
