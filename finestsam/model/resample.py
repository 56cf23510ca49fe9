"""Resize the decoder's logits to the pixels of an image, by matrix products.

segment_anything resizes twice, bilinearly: to the padded square, whose padding is cut off, and then to the image. Both
steps are linear and treat rows and columns separately, so together they are one product from the left and one from the
right. The matrices are banded and are multiplied in blocks that skip most of their zeros.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_PIXELS = 128


@dataclass(frozen=True)
class Axis:
    """The resizing of one axis, from 4g logits to pixels."""

    matrix: Tensor  # pixels x 4g, float32
    sources: list[tuple[int, int]]  # for each pixel the logits that it depends on: the first, and the last + 1

    def __hash__(self) -> int:
        return id(self)

    @cached_property
    def blocks(self) -> list[tuple[slice, slice]]:
        """Return blocks of pixels, each with the logits that they depend on."""
        starts = range(0, len(self.sources), BLOCK_PIXELS)
        parts = [self.sources[start : start + BLOCK_PIXELS] for start in starts]
        return [
            (slice(start, start + len(part)), slice(part[0][0], part[-1][1]))
            for start, part in zip(starts, parts, strict=True)
        ]

    def spread(self, logits: Tensor) -> Tensor:
        """Resize the rows of logits, ... x 4g x K, to pixels, ... x pixels x K."""
        matrix = self.matrix.to(logits)
        return torch.cat([matrix[pixels, used] @ logits[..., used, :] for pixels, used in self.blocks], dim=-2)


@lru_cache(maxsize=256)
def build_axis(low_side: int, image_size: int, input_length: int, length: int | None) -> Axis:
    """Return the resizing of one axis.

    Args:
        low_side: 4g, the logits of the padded square.
        image_size: pixels of the padded square.
        input_length: those of its pixels that hold the image.
        length: pixels of the image; None: stop at the input frame.
    """
    steps = F.interpolate(torch.eye(low_side)[None], image_size, mode="linear", align_corners=False)[..., :input_length]
    if length not in (None, input_length):
        steps = F.interpolate(steps, length, mode="linear", align_corners=False)
    matrix = steps[0].T.contiguous()  # pixels x 4g
    return Axis(matrix, pair(*find_ranges(matrix != 0)))


def find_ranges(is_used: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each row the first used column, and the last + 1; of a row without any the column count, and 0."""
    positions = torch.arange(is_used.shape[1])
    firsts = torch.where(is_used, positions, is_used.shape[1]).amin(1)
    return firsts, torch.where(is_used, positions, -1).amax(1) + 1


def pair(firsts: Tensor, ends: Tensor) -> list[tuple[int, int]]:
    """Return the ranges as a list of (first, end)."""
    return list(zip(firsts.tolist(), ends.tolist(), strict=True))


def upscale_logits(
    logits: Tensor, image_size: int, input_size: tuple[int, int], original_size: tuple[int, int] | None
) -> Tensor:
    """Resize the decoder's logits to the input frame, and on to the original one.

    The same as segment_anything's `Sam.postprocess_masks`, up to the rounding of sums.

    Args:
        logits: ... x 4g x 4g, of the padded square.
        original_size: None: stop at the input frame.

    Returns:
        ... x H x W.
    """
    rows, columns = (
        build_axis(logits.shape[-1], image_size, length, original_size and original_size[axis])
        for axis, length in enumerate(input_size)
    )
    return rows.spread(columns.spread(logits.transpose(-2, -1)).transpose(-2, -1))
