"""Measure the masks of prompts on annotated objects: IoU, Dice and boundary IoU, in the original frame."""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from finestsam.batch import Batch, Predictions, Sample
from finestsam.masks import boundary_iou, count_overlap, decode_rles
from finestsam.model.resample import upscale_logits
from finestsam.prediction.embedder import Embedder

# Logits upscaled at a time.
PIECE_PIXELS = 16_000_000


@dataclass(frozen=True)
class ObjectScore:
    """One prompted object, measured."""

    image_id: int
    annotation_id: int
    iou: float  # of the mask with the highest score
    dice: float  # of the same mask
    best_iou: float  # of the mask with the highest IoU
    boundary_iou: float  # of the mask with the highest score
    score: float  # predicted IoU of the same mask


@torch.no_grad()
def score_batches(
    embedder: Embedder, batches: Iterable[tuple[Batch, list[str]]], chunk_objects: int
) -> list[ObjectScore]:
    """Prompt every object of the batches and measure the masks.

    Args:
        batches: as `data.dataset.collate` makes them.
        chunk_objects: decoded at a time.
    """
    model, scores = embedder.model, []
    for batch, _ in print_skipped(batches):
        for sample in batch.to(model.device).samples:
            embedding = embedder.embed([sample])
            for first in range(0, len(sample), chunk_objects):
                predictions = model(embedding, sample.prompts[first : first + chunk_objects])
                scores += _score_objects(predictions, sample, first, model.image_size)
    return scores


def print_skipped(batches: Iterable[tuple[Batch, list[str]]]) -> Iterator[tuple[Batch, list[str]]]:
    """Yield the batches, and print which images could not be read."""
    for batch, messages in batches:
        for message in messages:
            tqdm.write(f"skipped: {message}", file=sys.stderr)
        yield batch, messages


def _score_objects(predictions: Predictions, sample: Sample, first: int, image_size: int) -> list[ObjectScore]:
    count, mask_count = predictions.scores.shape
    piece = max(1, PIECE_PIXELS // (max(math.prod(sample.original_size), image_size**2) * mask_count))
    scores = []
    for start in range(0, count, piece):
        logits = predictions.logits[start : start + piece]
        masks = upscale_logits(logits, image_size, sample.input_size, sample.original_size) > 0  # n x M x H x W
        indices = range(first + start, first + start + len(masks))
        truth = decode_rles([sample.rles[index] for index in indices]).to(masks.device)[:, None]
        shared, sizes = (counts.cpu().double() for counts in count_overlap(masks, truth))
        ious, dices = shared / (sizes - shared), 2 * shared / sizes  # the truth is never empty, so neither is a union
        for row, index in enumerate(indices):
            predicted = predictions.scores[start + row]
            chosen = int(predicted.argmax())
            mask, target = masks[row, chosen].cpu().numpy(), truth[row, 0].cpu().numpy()
            scores.append(
                ObjectScore(
                    sample.image_id,
                    sample.annotation_ids[index],
                    float(ious[row, chosen]),
                    float(dices[row, chosen]),
                    float(ious[row].max()),
                    boundary_iou(mask, target),
                    float(predicted[chosen]),
                )
            )
    return scores


def summarize_scores(scores: list[ObjectScore]) -> dict[str, float]:
    """Return means over objects, exactly rounded, so that they do not depend on the order or on the number of ranks."""
    count = len(scores)
    if count == 0:
        return {}
    return {
        "iou": math.fsum(score.iou for score in scores) / count,
        "dice": math.fsum(score.dice for score in scores) / count,
        "best_iou": math.fsum(score.best_iou for score in scores) / count,
        "boundary_iou": math.fsum(score.boundary_iou for score in scores) / count,
        "score": math.fsum(min(score.score, 1.0) for score in scores) / count,  # no IoU is above 1
        "objects": count,
    }
