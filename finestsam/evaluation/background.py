"""What a model predicts for points where no object is: a good one gives them low scores."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from finestsam.batch import Batch
from finestsam.prediction.embedder import Embedder


@dataclass(frozen=True)
class BackgroundScores:
    """The scores in one image."""

    image_id: int
    scores: np.ndarray  # K, of each point the best IoU that the model expects of a mask there
    is_taken: np.ndarray  # K, bool: the generator's threshold of predicted IoU would let a mask pass


@torch.no_grad()
def measure_background(
    embedder: Embedder, batches: Iterable[tuple[Batch, list[str]]], chunk_objects: int, pred_iou_thresh: float
) -> list[BackgroundScores]:
    """Ask at the points that the samples bring as their background; images without any are left out.

    Args:
        batches: as `data.dataset.collate` makes them.
        chunk_objects: points decoded at a time.
        pred_iou_thresh: of the generator; 0 lets every number pass.
    """
    model, found = embedder.model, []
    for batch, _ in batches:
        for sample in batch.to(model.device).samples:
            count = len(sample.background)
            if count == 0:
                continue
            embedding = embedder.embed([sample])
            parts = [sample.background[first : first + chunk_objects] for first in range(0, count, chunk_objects)]
            scores = torch.cat([model.score(embedding, part).amax(dim=1) for part in parts]).cpu().numpy()
            is_taken = scores > (pred_iou_thresh or -np.inf)
            found.append(BackgroundScores(sample.image_id, np.minimum(scores, 1), is_taken))  # no IoU is above 1
    return found


def summarize_background(found: list[BackgroundScores]) -> dict[str, float]:
    """Return the mean score over points, the share that passes the threshold, and the number of points."""
    if not found:
        return {}
    scores, is_taken = (np.concatenate([getattr(one, name) for one in found]) for name in ("scores", "is_taken"))
    return {
        "score": float(scores.mean(dtype=float)),
        "taken_share": float(is_taken.mean()),
        "points": len(scores),
    }
