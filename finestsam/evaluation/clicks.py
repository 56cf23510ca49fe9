"""How a model follows somebody who corrects it: IoU after one click, two, three, five, eight.

The first click is on the middle of the object, the others are as `prediction.correction` sets them.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from finestsam.batch import Batch, Prompts, Sample
from finestsam.masks import decode_rle
from finestsam.prediction.clicks import Shown, add_clicks, show_preferred
from finestsam.prediction.embedder import Embedder

REPORTED = (1, 2, 3, 5, 8)


@torch.no_grad()
def measure_clicks(
    embedder: Embedder, batches: Iterable[tuple[Batch, list[str]]], chunk_objects: int, clicks: int = REPORTED[-1]
) -> list[list[float]]:
    """Return for each object the IoU after each of so many clicks.

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
    return ious


def average_clicks(ious: list[list[float]]) -> dict[int, float]:
    """Return the mean IoU over objects after each number of clicks in `REPORTED`, as far as there were so many."""
    wanted = [count for count in REPORTED if ious and count <= len(ious[0])]
    return {count: math.fsum(row[count - 1] for row in ious) / len(ious) for count in wanted}


def _correct(
    embedder: Embedder, embedding: Tensor, sample: Sample, truth: list[np.ndarray], clicks: int
) -> list[list[float]]:
    """Return for each object the IoU after each click."""
    model = embedder.model
    prompts, shown = Prompts(), Shown([np.zeros_like(mask) for mask in truth], None)
    ious: list[list[float]] = [[] for _ in truth]
    for _ in range(clicks):
        prompts = add_clicks(prompts, shown, truth, sample).to(model.device)
        shown = show_preferred(model(embedding, prompts), sample, model.image_size)
        for row, (mask, predicted) in enumerate(zip(truth, shown.masks, strict=True)):
            ious[row].append(np.count_nonzero(predicted & mask) / np.count_nonzero(predicted | mask))
    return ious
