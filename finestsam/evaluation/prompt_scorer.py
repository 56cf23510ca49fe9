"""The fixed battery of questions: a point, a box and corrective clicks on every object, and points where none is."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from finestsam.batch import Batch
from finestsam.config import CHUNK_OBJECTS, Config, PromptsConfig
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.loaders import build_validation_loader
from finestsam.evaluation.background import BackgroundScores, measure_background
from finestsam.evaluation.clicks import measure_clicks
from finestsam.evaluation.prompt_scores import ObjectScore, score_batches
from finestsam.prediction.embedder import Embedder, fill_store
from finestsam.prediction.generator import resolve_generator
from finestsam.records import Record

PROMPT_KINDS = {
    "point": PromptsConfig(use_points=True, use_boxes=False),
    "box": PromptsConfig(use_points=False, use_boxes=True, box_jitter_ratio=0.0),
}


@dataclass(frozen=True)
class PromptScorer:
    """Scores one model's masks on labelled images for a fixed set of prompts, the same for every model.

    Args:
        records: each with at least one object.
        title: of the progress bars; None: no bars.
    """

    config: Config
    embedder: Embedder
    records: list[Record]
    title: str | None

    def score_prompts(self, kinds: Sequence[str] = tuple(PROMPT_KINDS)) -> dict[str, list[ObjectScore]]:
        """Ask for every object with one prompt of each kind."""
        return {
            kind: score_batches(self.embedder, self._load(kind, PROMPT_KINDS[kind]), self._chunk_objects)
            for kind in kinds
        }

    def measure_clicks(self) -> list[list[float]]:
        """Correct the model on every object, click by click; nothing where the settings want none."""
        clicks = self.config.evaluate.clicks
        if clicks == 0:
            return []
        batches = self._load("clicks", PROMPT_KINDS["point"])
        return measure_clicks(self.embedder, batches, self._chunk_objects, clicks)

    def measure_background(self, pred_iou_thresh: float) -> list[BackgroundScores]:
        """Ask at points where no object is; nothing where the settings want none."""
        count = self.config.evaluate.background_points
        if count == 0:
            return []
        batches = self._load("background", PROMPT_KINDS["point"], count)
        return measure_background(self.embedder, batches, self._chunk_objects, pred_iou_thresh)

    @property
    def _chunk_objects(self) -> int:
        return self.config.chunk_objects or CHUNK_OBJECTS

    def _load(self, name: str, prompts: PromptsConfig, background_points: int = 0) -> Iterable[tuple[Batch, list[str]]]:
        """Return the images with prompts of a kind, their embeddings in the store."""
        config = self.config
        points = {"positive_points": 1, "negative_points": 0, "prompts_per_object": 1}
        settings = SampleSettings(
            self.embedder.model.image_size,
            # As in training's validation: what is stored beside one model would give it other points than another.
            resolve_generator(config.generator, card=None).points_per_side,
            config.seed_device or 0,
            prompts,
            replace(config.dataset, **points, background_points=background_points),
        )
        dataset = SampleDataset(self.records, settings, store=self.embedder.store)
        if self.embedder.store:
            fill_store(self.embedder, [dataset], config.num_workers)
        loader = build_validation_loader(dataset, config.num_workers)
        is_quiet = self.title is None or not sys.stderr.isatty()
        return tqdm(loader, desc=f"{self.title}, {name}", disable=is_quiet, leave=False)
