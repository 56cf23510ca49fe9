"""Focal, Dice and score losses per object, in float32, computed in bounded memory.

Every function returns one value per object or mask. The training step averages them over the objects of the whole step.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finestsam.batch import Predictions, Sample
from finestsam.config import LossesConfig
from finestsam.images.frames import shrink_mask
from finestsam.masks import count_overlap, decode_rle
from finestsam.model.resample import upscale_logits
from finestsam.model.sam import FinestSam

# +1 keeps an empty target with an empty prediction at loss 0, not 0/0.
DICE_SMOOTH = 1.0
# exp(-MAX_LOG) is still a normal float32.
MAX_LOG = 80.0
# Logits in one chunk of the loss; larger chunks do not fit the CPU's cache and are slower.
PIECE_PIXELS = 4_000_000
LARGE_TENSORS = 12  # tensors of that size that a chunk holds at the same time


def focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the focal loss (arXiv 1708.02002) averaged over pixels, one value per mask.

    Args:
        logits: ... x H x W.
        targets: the same shape, or one that broadcasts to it, 0 or 1.
        alpha: weight of the pixels inside, 1 - alpha of those outside; below 0: no weights.
    """
    # 1 - p_t, from the logits, so that a confident pixel does not lose its last digits in 1 - p.
    wrongness = logits * (1 - 2 * targets)
    missed = torch.sigmoid(wrongness)
    # -log p_t. The usual form log(1 + exp) takes six times as long as a log; beyond the limit it is linear.
    cross_entropy = (wrongness - MAX_LOG).clamp(min=0) - torch.log(torch.sigmoid(-wrongness.clamp(max=MAX_LOG)))
    loss = cross_entropy * missed**gamma
    if alpha >= 0:
        loss = loss * (1 - alpha + (2 * alpha - 1) * targets)
    return loss.mean(dim=(-2, -1))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - Dice of the probabilities, one value per mask; both empty gives 0.

    Args:
        logits: ... x H x W.
        targets: the same shape, or one that broadcasts to it, 0 or 1.
    """
    inside = torch.sigmoid(logits)
    overlap = 2 * (inside * targets).sum(dim=(-2, -1))
    total = inside.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
    return 1 - (overlap + DICE_SMOOTH) / (total + DICE_SMOOTH)


def measure_overlap(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and Dice of the masks (logits above 0) with the truth; 1 where both are empty.

    Args:
        logits: ... x H x W.
        targets: the same shape, or one that broadcasts to it, 0 or 1.
    """
    shared, sizes = count_overlap(logits > 0, targets > 0.5)
    iou = torch.where(sizes > 0, shared / (sizes - shared).clamp(min=1), 1.0)
    dice = torch.where(sizes > 0, 2 * shared / sizes.clamp(min=1), 1.0)
    return iou, dice


@dataclass
class ObjectLosses:
    """One value per object, N; only `total` has a gradient, and the parts are not weighted."""

    total: Tensor
    focal: Tensor
    dice: Tensor
    iou_error: Tensor  # mean squared error of the scores of all M masks
    iou: Tensor  # measured, of the mask that is trained
    score: Tensor  # predicted, of the same mask
    best: Tensor  # index of the same mask among the M masks
    ious: Tensor  # measured, of all masks, N x M


def object_losses(
    predictions: Predictions, sample: Sample, first: int, settings: LossesConfig, image_size: int
) -> ObjectLosses:
    """Return the losses of the objects `first`, `first` + 1, ... of a sample.

    Each object trains only its best mask, the one with the lowest loss (SAM paper, section 3). The scores of all its
    masks learn the measured IoU.

    The loss is computed in chunks, in the frame that the settings name, and only its derivative by the decoder's small
    logits is kept: memory depends on the chunk, not on the number of objects, and the gradient is the same.
    """
    count, mask_count = predictions.scores.shape
    piece = _choose_piece_size(sample, settings.resolution, image_size, mask_count)
    results = []
    for start in range(0, count, piece):
        logits = predictions.logits[start : start + piece]
        rles = sample.rles[first + start : first + start + len(logits)]
        targets = _render_targets(rles, sample, settings.resolution).to(logits.device)
        results.append(_best_mask_loss(logits, targets, sample, settings, image_size))
    mask_loss, focal, dice, best, ious = zip(*results, strict=True)
    best, ious = torch.cat(best), torch.cat(ious)
    iou_error = (predictions.scores - ious).square().mean(dim=1)
    total = torch.cat(mask_loss) + settings.iou_ratio * iou_error
    rows = torch.arange(len(best), device=best.device)
    score = predictions.scores.detach()[rows, best]
    parts = (torch.cat(focal), torch.cat(dice), iou_error.detach(), ious[rows, best], score, best, ious)
    return ObjectLosses(total, *parts)


def _best_mask_loss(
    logits: Tensor, targets: Tensor, sample: Sample, settings: LossesConfig, image_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the weighted mask loss of each object's best mask, its parts, the mask's index, and the IoU of all M."""
    with torch.no_grad():
        large = _to_frame(logits, sample, settings.resolution, image_size)
        focal, dice = _mask_losses(large, targets, settings)
        ious, _ = measure_overlap(large, targets[:, None])
        best = (settings.focal_ratio * focal + settings.dice_ratio * dice).argmin(dim=1)
    rows = torch.arange(len(best), device=best.device)
    chosen = logits[rows, best][:, None]  # n x 1 x 4g x 4g
    loss = _SmallGradient.apply(chosen, lambda small: _weighted_mask_loss(small, targets, sample, settings, image_size))
    return loss, focal[rows, best], dice[rows, best], best, ious


class _SmallGradient(torch.autograd.Function):
    """Compute a loss of upscaled masks, and keep only its derivative by the small logits."""

    @staticmethod
    def forward(ctx, small: Tensor, loss_of: object) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(needs_gradient):
            leaf = small.detach().requires_grad_(needs_gradient)
            losses = loss_of(leaf)  # n, each of its own row only
            if needs_gradient:
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
                ctx.save_for_backward(gradient)
        return losses.detach()

    @staticmethod
    def backward(ctx, factors: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factors[:, None, None, None], None


def _weighted_mask_loss(
    logits: Tensor, targets: Tensor, sample: Sample, settings: LossesConfig, image_size: int
) -> Tensor:
    large = _to_frame(logits, sample, settings.resolution, image_size)
    focal, dice = _mask_losses(large, targets, settings)
    return (settings.focal_ratio * focal + settings.dice_ratio * dice)[:, 0]


def _mask_losses(large: Tensor, targets: Tensor, settings: LossesConfig) -> tuple[Tensor, Tensor]:
    """Return focal and Dice losses, n x M each, of logits in the frame of the loss."""
    truth = targets[:, None]
    return focal_loss(large, truth, settings.focal_alpha, settings.focal_gamma), dice_loss(large, truth)


def _to_frame(logits: Tensor, sample: Sample, resolution: str, image_size: int) -> Tensor:
    if resolution == "low":
        height, width = _find_target_size(sample.original_size, sample.input_size, resolution)
        return logits[..., :height, :width]
    original_size = sample.original_size if resolution == "original" else None
    return upscale_logits(logits, image_size, sample.input_size, original_size)


def _find_target_size(original_size: tuple[int, int], input_size: tuple[int, int], resolution: str) -> tuple[int, int]:
    if resolution == "low":
        # The decoder's grid has 4 input pixels to a cell; a cell that is partly image counts.
        height, width = (math.ceil(side / 4) for side in input_size)
        return height, width
    return original_size if resolution == "original" else input_size


def _render_targets(rles: list[dict], sample: Sample, resolution: str) -> Tensor:
    """Return n x H x W, float32, 0 or 1, in the frame of the loss."""
    size = _find_target_size(sample.original_size, sample.input_size, resolution)
    masks = [decode_rle(rle) for rle in rles]
    if size != sample.original_size:
        masks = [_resize_target(mask, size) for mask in masks]
    return torch.stack([torch.from_numpy(mask) for mask in masks]).float()


def _resize_target(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels that a mask (H x W, bool) covers by more than half, bool, at (height, width) `size`.

    A small or thin object may cover none by more than half. Then these are the pixels that it covers most, because an
    empty target would teach that nothing is there.
    """
    cover = shrink_mask(mask, size)
    inside = cover > 0.5
    return inside if inside.any() else (cover > 0) & (cover >= cover.max() / 2)


def _choose_piece_size(sample: Sample, resolution: str, image_size: int, mask_count: int) -> int:
    return max(1, PIECE_PIXELS // _count_pixels(sample, resolution, image_size, mask_count))


def _count_pixels(sample: Sample, resolution: str, image_size: int, mask_count: int) -> int:
    """Return the pixels of one object's masks at their largest size."""
    return count_frame_pixels(sample.original_size, sample.input_size, resolution, image_size) * mask_count


def count_frame_pixels(
    original_size: tuple[int, int], input_size: tuple[int, int], resolution: str, image_size: int
) -> int:
    """Return the pixels of one mask at its largest size on the way to the frame of the loss."""
    height, width = _find_target_size(original_size, input_size, resolution)
    return max(height * width, image_size**2 if resolution != "low" else 0)


def measure_piece_bytes(sample: Sample, settings: LossesConfig, model: FinestSam) -> int:
    """Return about how many bytes one chunk of the loss takes while it is computed."""
    mask_count = 3 if model.multimask_output else 1
    pixels = _count_pixels(sample, settings.resolution, model.image_size, mask_count)
    return max(pixels, PIECE_PIXELS) * 4 * LARGE_TENSORS
