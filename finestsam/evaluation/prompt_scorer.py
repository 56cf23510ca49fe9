"""Measure a fixed set of prompts: a point, a box and corrective clicks for each object, and background points."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from finestsam.batch import Batch, Prompts, Sample
from finestsam.config import CHUNK_OBJECTS, Config, PromptsConfig
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.loaders import build_validation_loader
from finestsam.evaluation.prompt_scores import ObjectScore, score_batches
from finestsam.masks import decode_rle
from finestsam.prediction.clicks import Shown, add_clicks, show_preferred
from finestsam.prediction.embedder import Embedder, fill_store
from finestsam.prediction.generator import resolve_generator
from finestsam.records import Record

REPORTED = (1, 2, 3, 5, 8)


@torch.no_grad()
def measure_clicks(
    embedder: Embedder, batches: Iterable[tuple[Batch, list[str]]], chunk_objects: int, clicks: int = REPORTED[-1]
) -> list[list[float]]:
    """Return for each object the IoU after each click.

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
    """Return the mean IoU over objects after each number of clicks in `REPORTED` that was reached."""
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


@dataclass(frozen=True)
class BackgroundScores:
    """The scores of background points in one image."""

    image_id: int
    scores: np.ndarray  # K, the highest predicted IoU of each point's masks
    is_taken: np.ndarray  # K, bool: this score passes the generator's pred_iou_thresh


@torch.no_grad()
def measure_background(
    embedder: Embedder, batches: Iterable[tuple[Batch, list[str]]], chunk_objects: int, pred_iou_thresh: float
) -> list[BackgroundScores]:
    """Score the masks at the samples' background points; images without any are left out.

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
    scores, is_taken = (np.concatenate([getattr(image, name) for image in found]) for name in ("scores", "is_taken"))
    return {
        "score": float(scores.mean(dtype=float)),
        "taken_share": float(is_taken.mean()),
        "points": len(scores),
    }


BACKGROUND_POINTS = 32  # in each image, of the generator's grid
PROMPT_KINDS = {
    "point": PromptsConfig(use_points=True, use_boxes=False),
    "box": PromptsConfig(use_points=False, use_boxes=True),
}


@dataclass(frozen=True)
class PromptScorer:
    """Measures one model on labelled images with a fixed set of prompts, the same for every model.

    Args:
        records: each with at least one object.
        title: of the progress bars; None: no bars.
    """

    config: Config
    embedder: Embedder
    records: list[Record]
    title: str | None

    def score_prompts(self, kinds: Sequence[str] = tuple(PROMPT_KINDS)) -> dict[str, list[ObjectScore]]:
        """Predict the masks of every object from one prompt of each kind, and score them."""
        return {
            kind: score_batches(self.embedder, self._load(kind, PROMPT_KINDS[kind]), self._chunk_objects)
            for kind in kinds
        }

    def measure_clicks(self) -> list[list[float]]:
        """Return the IoUs of every object after each corrective click; empty where the settings want none."""
        clicks = self.config.evaluate.clicks
        if clicks == 0:
            return []
        batches = self._load("clicks", PROMPT_KINDS["point"])
        return measure_clicks(self.embedder, batches, self._chunk_objects, clicks)

    def measure_background(self, pred_iou_thresh: float) -> list[BackgroundScores]:
        """Score points on no object."""
        batches = self._load("background", PROMPT_KINDS["point"], BACKGROUND_POINTS)
        return measure_background(self.embedder, batches, self._chunk_objects, pred_iou_thresh)

    @property
    def _chunk_objects(self) -> int:
        return self.config.chunk_objects or CHUNK_OBJECTS

    def _load(self, name: str, prompts: PromptsConfig, background_points: int = 0) -> Iterable[tuple[Batch, list[str]]]:
        """Return batches of the images with prompts of a kind; embeddings that the store lacks are computed first."""
        config = self.config
        points = {"positive_points": 1, "negative_points": 0, "prompts_per_object": 1}
        settings = SampleSettings(
            self.embedder.model.image_size,
            # Without the card, as in validation: the grid stored beside a model would give each model other points.
            resolve_generator(config.generator, card=None).points_per_side,
            config.seed_device or 0,
            prompts,
            replace(config.dataset, **points, background_points=background_points),
            jitters_boxes=False,
        )
        dataset = SampleDataset(self.records, settings, store=self.embedder.store)
        if self.embedder.store:
            fill_store(self.embedder, [dataset], config.num_workers)
        loader = build_validation_loader(dataset, config.num_workers)
        is_quiet = self.title is None or not sys.stderr.isatty()
        return tqdm(loader, desc=f"{self.title}, {name}", disable=is_quiet, leave=False)
