"""Draw what things are made of: colours and patterns as photographs show them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from finestsam.data.synthetic import render_lines, turn_grid
from finestsam.images.frames import enlarge

PATTERNS = ("plain", "grown", "spotted", "streaked", "striped")
PATTERN_SHARES = (0.35, 0.3, 0.12, 0.13, 0.1)


@dataclass
class Surface:
    """Two colours (each 3, RGB) and how they are mixed."""

    colour: np.ndarray
    other: np.ndarray
    pattern: str
    grain: float  # of the pattern, pixels of a body of 100 pixels' radius

    def dim(self, share: float) -> Surface:
        """Return it with `share` of its light."""
        return replace(self, colour=share * self.colour, other=share * self.other)

    def show(self, rng: np.random.Generator, size: tuple[int, int], grain: float) -> np.ndarray:
        """Return a stretch of it (H x W x 3, float32) whose pattern has grains of `grain` pixels."""
        colour, other = np.float32(self.colour), np.float32(self.other)
        return colour + render_texture(rng, size, self.pattern, grain)[..., None] * (other - colour)


def sample_surface(rng: np.random.Generator) -> Surface:
    """Draw what something is made of."""
    colour = sample_colour(rng)
    other = colour + rng.normal(0, 22) + rng.normal(0, 9, 3)
    if rng.random() < 0.25:
        other = sample_colour(rng)
    pattern = rng.choice(PATTERNS, p=PATTERN_SHARES)
    return Surface(colour, other, pattern, math.exp(rng.uniform(math.log(3), math.log(60))))


def sample_colour(rng: np.random.Generator) -> np.ndarray:
    """Return a colour (3, RGB) as photographs have them: seldom vivid, brown more often than green."""
    value, saturation = rng.uniform(25, 240), rng.beta(1.2, 3) if rng.random() < 0.75 else rng.uniform(0.4, 1)
    hue = rng.choice((0.07, 0.1, 0.58, 0.3, rng.random()), p=(0.3, 0.2, 0.15, 0.1, 0.25)) + rng.normal(0, 0.03)
    wheel = np.clip(2 - np.abs((hue * 6 - np.array([0, 2, 4]) + 3) % 6 - 3), 0, 1)
    return value * (1 - saturation * (1 - wheel))  # HSV


def render_texture(rng: np.random.Generator, size: tuple[int, int], pattern: str, grain: float) -> np.ndarray:
    """Return the share of a surface's other colour in each pixel (H x W, float32), about 0 to 1."""
    match pattern:
        case "plain":
            return 0.5 * render_fractal(rng, size, 4 * grain, 2)
        case "grown":  # as stone, fur, leaves
            return render_fractal(rng, size, grain, rng.uniform(1, 2))
        case "spotted":
            return sharpen(render_fractal(rng, size, 2 * grain, 1.8), rng.uniform(4, 16))
        case "streaked":
            return render_fractal(rng, size, grain, 1.2, stretch=rng.uniform(3, 8))
        case _:  # striped, along a wave
            along, across = turn_grid(size, rng.uniform(0, 2 * np.pi))
            bent = along + rng.uniform(0, 0.5) * grain * np.sin(across / (3 * grain))
            lines = np.float32(render_lines(bent, 2 * grain, grain * rng.uniform(0.3, 1.2)))
            return np.clip(lines + 0.4 * (render_fractal(rng, size, grain, 1.5) - 0.5), 0, 1)


def render_fractal(
    rng: np.random.Generator, size: tuple[int, int], grain: float, slope: float, stretch: float = 1
) -> np.ndarray:
    """Return noise (H x W, float32) of mean 0.5 and deviation 0.25 whose octaves weaken as images of nature do.

    Args:
        grain: of its coarsest octave, pixels.
        slope: an octave of half the grain has 2 ** -(slope / 2) of the deviation.
        stretch: how much longer than wide its grains are, level or upright.
    """
    height, width = size
    upright = rng.random() < 0.5
    total, power = np.zeros(size, np.float32), 0.0
    octave = 0
    while octave == 0 or (grain / 2**octave > 1.5 and octave < 6):
        step = max(1.5, grain / 2**octave)
        steps = (step, max(1.5, step / stretch)) if upright else (max(1.5, step / stretch), step)
        cells = [max(2, math.ceil(length / one) + 3) for length, one in zip(size, steps, strict=True)]
        coarse = rng.standard_normal(cells, np.float32)
        weight = 2 ** (-slope / 2 * octave)
        grown = (round(cell * one) for cell, one in zip(cells, steps, strict=True))
        shown = enlarge(coarse, tuple(max(length, reach) for length, reach in zip(size, grown, strict=True)))
        total += np.float32(weight) * shown[:height, :width]
        power += 0.5 * weight**2  # interpolated between its cells, white noise keeps about half of its variance
        octave += 1
    return 0.5 + np.float32(0.25 / math.sqrt(power)) * total


def sharpen(weight: np.ndarray, steepness: float) -> np.ndarray:
    """Return noise about 0.5 pushed towards 0 and 1."""
    return 1 / (1 + np.exp(np.float32(-steepness) * (weight - 0.5)))
