"""Masks at the size of their image, computed only where their logits can matter.

Two bilinear steps resize the decoder's 4g x 4g logits to the image; `resample.py` makes them one matrix for each axis,
built once per frame. A bilinear step stays within the range of the values around it: where no logit nearby is above a
cutoff, no pixel is. So for a mask that covers 1 % of the image, only about 1 % is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from finestsam.model.resample import Axis, build_axis, find_ranges, pair


class _Reach:
    """Which pixels of an axis depend on which logits."""

    def __init__(self, axis: Axis):
        self.matrix = axis.matrix
        self._sources = axis.sources
        firsts, ends = find_ranges((axis.matrix != 0).T)
        # For each logit: the first pixel that it or a later logit reaches, and the last + 1 that it or an earlier
        # logit reaches. Logits in the padding reach no pixel, and in small images many others reach none.
        self._pixels = pair(firsts.flip(0).cummin(0).values.flip(0), ends.cummax(0).values)

    def find(self, first: int, end: int) -> tuple[slice, slice]:
        """Return the pixels that logits first to end - 1 reach, and the logits that these pixels depend on."""
        pixels = slice(self._pixels[first][0], self._pixels[end - 1][1])
        if pixels.start >= pixels.stop:
            return slice(0, 0), slice(0, 0)
        return pixels, slice(self._sources[pixels.start][0], self._sources[pixels.stop - 1][1])


@dataclass(frozen=True)
class Region:
    """The pixels of one mask that can be above the cutoff, in its frame of height x width."""

    logits: Tensor  # h x w; every pixel outside is at or below the cutoff
    top: int
    left: int


class Upscaler:
    """Resizes logits to one frame.

    The same pixels as segment_anything's `Sam.postprocess_masks`, up to the rounding of sums.

    Args:
        low_side: 4g, of the padded square.
        image_size: pixels of the padded square.
        input_size: (height, width) of the part of it that holds the image.
        size: (height, width) of the image.
    """

    def __init__(self, low_side: int, image_size: int, input_size: tuple[int, int], size: tuple[int, int]):
        self.size = size
        self._rows, self._columns = (
            _build_reach(low_side, image_size, input_length, length)
            for input_length, length in zip(input_size, size, strict=True)
        )

    def upscale(self, logits: Tensor, cutoff: float) -> Iterator[Region]:
        """Yield for each of K x 4g x 4g logits the region outside which nothing is above the cutoff."""
        boxes = find_boxes(logits > cutoff).tolist()
        rows, columns = (axis.matrix.to(logits.device) for axis in (self._rows, self._columns))
        for mask_logits, box in zip(logits, boxes, strict=True):
            yield self._upscale_box(mask_logits, box, rows, columns)

    def _upscale_box(self, logits: Tensor, box: list[int], rows: Tensor, columns: Tensor) -> Region:
        x0, y0, x1, y1 = box
        if x1 < x0:
            return Region(logits.new_zeros(0, 0), 0, 0)
        tall, from_rows = self._rows.find(y0, y1 + 1)
        wide, from_columns = self._columns.find(x0, x1 + 1)
        part = rows[tall, from_rows] @ logits[from_rows, from_columns] @ columns[wide, from_columns].T
        return Region(part, tall.start, wide.start)

    def render(self, logits: Tensor) -> Tensor:
        """Return one mask, H x W, bool, from its 4g x 4g logits."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=logits.device)
        (region,) = self.upscale(logits[None], 0.0)
        height, width = region.logits.shape
        mask[region.top : region.top + height, region.left : region.left + width] = region.logits > 0
        return mask


def measure_masks(upscaler: Upscaler, logits: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Return the stability, K, and the boxes, K x 4, of masks, K x 4g x 4g logits, in the upscaler's frame.

    Stability is the area above the threshold + `offset` over the area above the threshold - `offset`, as in
    segment_anything's `calculate_stability_score`; 0 where the latter is empty. Boxes are XYXY with both corners
    inside, the first behind the last for an empty mask.
    """
    counts = torch.zeros(len(logits), 2, device=logits.device)
    boxes = torch.tensor([0, 0, -1, -1], device=logits.device).repeat(len(logits), 1)
    for row, region in enumerate(upscaler.upscale(logits, -offset)):
        if region.logits.numel():
            counts[row, 0], counts[row, 1] = _count(region.logits > offset), _count(region.logits > -offset)
            corner = torch.tensor([region.left, region.top] * 2, device=logits.device)
            boxes[row] = find_boxes((region.logits > 0)[None])[0] + corner
    return counts[:, 0] / counts[:, 1].clamp(min=1), boxes


def find_boxes(masks: Tensor) -> Tensor:
    """Return the first and last pixel inside, K x 4, XYXY; an empty mask has its first behind its last."""
    firsts, lasts = [], []
    for dim in (1, 2):
        is_inside = masks.view(torch.uint8).amax(dim).bool()  # K x w, then K x h; as bytes far faster than `any`
        positions = torch.arange(is_inside.shape[1], device=masks.device)
        firsts.append(torch.where(is_inside, positions, len(positions)).amin(1))
        lasts.append(torch.where(is_inside, positions, -1).amax(1))
    return torch.stack([*firsts, *lasts], dim=1)


def _count(mask: Tensor) -> Tensor | int:
    # On the CPU numpy counts five times faster than torch. On a GPU a Python number would force a synchronisation.
    return np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else torch.count_nonzero(mask)


@lru_cache(maxsize=256)
def _build_reach(low_side: int, image_size: int, input_length: int, length: int) -> _Reach:
    return _Reach(build_axis(low_side, image_size, input_length, length))
