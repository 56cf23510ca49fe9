"""Correct masks click by click, as an annotator does.

Each click is in the middle of the largest error: positive where the mask misses the object, negative where it exceeds
it. With each click the logits of the last mask are the mask prompt (arXiv 2304.02643, section 3; the protocol of
interactive segmentation, as in arXiv 2102.06583).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from finestsam.batch import Predictions, Prompts, Sample
from finestsam.data.prompts import MISSING, NEGATIVE, POSITIVE
from finestsam.images.frames import scale_points
from finestsam.masks import distance_inside, find_largest_component
from finestsam.model.resample import upscale_logits


@dataclass
class Shown:
    """The masks of N prompts that the next clicks correct."""

    masks: list[np.ndarray]  # N, each H x W, bool, original frame
    logits: Tensor | None  # N x 1 x 4g x 4g, of the same masks; None before the first prediction


@torch.no_grad()
def show_preferred(predictions: Predictions, sample: Sample, image_size: int) -> Shown:
    """Return for each prompt the mask with the highest score; without gradient."""
    rows = torch.arange(len(predictions.scores), device=predictions.scores.device)
    logits = predictions.logits.detach()[rows, predictions.scores.argmax(dim=1)][:, None]
    masks = []
    for mask_logits in logits:  # one at a time, because they are large at the size of the image
        large = upscale_logits(mask_logits[None], image_size, sample.input_size, sample.original_size)
        masks.append((large[0, 0] > 0).cpu().numpy())
    return Shown(masks, logits)


def add_clicks(prompts: Prompts, shown: Shown, truth: list[np.ndarray], sample: Sample) -> Prompts:
    """Return the prompts with one more click each; the logits that it corrects replace the mask prompt.

    Args:
        prompts: N, or none before the first click.
        truth: N masks, each H x W, bool, original frame.
    """
    clicks = [find_click(mask, predicted) for mask, predicted in zip(truth, shown.masks, strict=True)]
    points = np.array([position for position, _ in clicks], dtype=float)  # N x 2
    inputs = scale_points(points, sample.original_size, sample.input_size)
    device = "cpu" if shown.logits is None else shown.logits.device
    points = torch.tensor(inputs, dtype=torch.float32, device=device)[:, None]
    labels = torch.tensor([label for _, label in clicks], device=device)[:, None]
    if prompts.points is not None:
        points, labels = torch.cat([prompts.points, points], dim=1), torch.cat([prompts.labels, labels], dim=1)
    return replace(prompts, points=points, labels=labels, mask_logits=shown.logits, has_mask=None)


def find_click(truth: np.ndarray, shown: np.ndarray) -> tuple[tuple[int, int], int]:
    """Return the next click, XY, original frame, and its label; `MISSING` where the mask has no error.

    Args:
        truth, shown: H x W, bool.
    """
    errors = truth ^ shown
    rows, columns = (np.flatnonzero(errors.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return (0, 0), MISSING
    top, left = int(rows[0]), int(columns[0])
    part = np.s_[top : rows[-1] + 1, left : columns[-1] + 1]
    missed, excess = (find_largest_component(mask[part] & errors[part]) for mask in (truth, shown))
    is_positive = np.count_nonzero(missed[0]) >= np.count_nonzero(excess[0])
    region, corner = missed if is_positive else excess
    depth = distance_inside(region)
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return (left + corner[0] + int(x), top + corner[1] + int(y)), POSITIVE if is_positive else NEGATIVE
