"""How a model follows somebody who corrects it: IoU after one click, two, three, five, eight.

The first click is on the middle of the object. Each further one is in the middle of the largest error, an addition
where the object was missed and a removal where it was overstepped, and brings the logits of the answer before it along,
as annotators work with SAM (arXiv 2304.02643, section 3; the protocol of interactive segmentation).
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from finestsam.batch import Batch, Prompts, Sample
from finestsam.data.prompts import MISSING, NEGATIVE, POSITIVE
from finestsam.images import scale_points
from finestsam.masks import decode_rle, distance_inside, find_components
from finestsam.model.resample import upscale_logits
from finestsam.prediction.precompute import Embedder

REPORTED = (1, 2, 3, 5, 8)


@torch.no_grad()
def measure_clicks(
    embedder: Embedder, batches: Iterable[tuple[Batch, list[str]]], chunk_objects: int, clicks: int = REPORTED[-1]
) -> dict[int, float]:
    """Return the mean IoU over objects after 1 to `clicks` clicks, those of `REPORTED`.

    Args:
        batches: as `data.dataset.collate` makes them; their own prompts are not used.
        chunk_objects: decoded at a time.
    """
    ious = []
    for batch, _ in batches:
        for sample in batch.to(embedder.model.device).samples:
            embedding = embedder.embed([sample])
            for first in range(0, len(sample), chunk_objects):
                masks = [decode_rle(rle) for rle in sample.rles[first : first + chunk_objects]]
                ious += _correct(embedder, embedding, sample, masks, clicks)
    wanted = [count for count in REPORTED if count <= clicks]
    return {count: math.fsum(row[count - 1] for row in ious) / len(ious) for count in wanted} if ious else {}


def _correct(
    embedder: Embedder, embedding: Tensor, sample: Sample, truth: list[np.ndarray], clicks: int
) -> list[list[float]]:
    """Return for each object the IoU after each click."""
    model, count = embedder.model, len(truth)
    points = np.zeros((count, clicks, 2))
    labels = np.full((count, clicks), MISSING)
    logits: Tensor | None = None
    shown = [np.zeros_like(mask) for mask in truth]
    ious: list[list[float]] = [[] for _ in truth]
    for number in range(clicks):
        for row, mask in enumerate(truth):
            points[row, number], labels[row, number] = find_click(mask, shown[row])
        asked = scale_points(points[:, : number + 1].reshape(-1, 2), sample.original_size, sample.input_size)
        prompts = Prompts(
            torch.tensor(asked.reshape(count, number + 1, 2), dtype=torch.float32, device=model.device),
            torch.tensor(labels[:, : number + 1], device=model.device),
            mask_logits=logits,
        )
        predictions = model(embedding, prompts)
        rows = torch.arange(count, device=model.device)
        chosen = predictions.logits[rows, predictions.scores.argmax(dim=1)][:, None]  # N x 1 x 4g x 4g
        for row in range(count):
            large = upscale_logits(chosen[row, None], model.image_size, sample.input_size, sample.original_size)
            shown[row] = (large[0, 0] > 0).cpu().numpy()
            union = np.count_nonzero(shown[row] | truth[row])
            ious[row].append(np.count_nonzero(shown[row] & truth[row]) / union)
        logits = chosen
    return ious


def find_click(truth: np.ndarray, shown: np.ndarray) -> tuple[tuple[int, int], int]:
    """Return where somebody would click next, XY, original frame, and the label of the click; none where all is right.

    Args:
        truth, shown: H x W, bool.
    """
    errors = truth ^ shown
    rows, columns = (np.flatnonzero(errors.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return (0, 0), MISSING
    top, left = int(rows[0]), int(columns[0])
    part = np.s_[top : rows[-1] + 1, left : columns[-1] + 1]
    best, where, label = 0.0, (0, 0), MISSING
    for region, kind in ((truth[part] & errors[part], POSITIVE), (shown[part] & errors[part], NEGATIVE)):
        count, regions = find_components(region)
        if count == 0:
            continue
        area = np.bincount(regions.ravel())[1:]
        if area.max() > best:
            depth = distance_inside(regions == 1 + area.argmax())
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            best, where, label = area.max(), (left + int(x), top + int(y)), kind
    return where, label
