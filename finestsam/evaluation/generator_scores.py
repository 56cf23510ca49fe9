"""Run the automatic mask generator on labelled pictures."""

import sys
from collections.abc import Sequence

from tqdm import tqdm

from finestsam.config import GeneratorConfig, ImagesConfig
from finestsam.data.embeddings import picture_key
from finestsam.data.index import Record
from finestsam.errors import Defect
from finestsam.evaluation.coco_scores import Detections
from finestsam.images import read_image
from finestsam.prediction.generator import generate_masks
from finestsam.prediction.precompute import Embedder


def find_all(
    embedder: Embedder,
    records: Sequence[Record],
    settings: GeneratorConfig,
    images: ImagesConfig,
    title: str = "generator",
) -> list[Detections | None]:
    """Run the generator on each picture; None for one that broke since it was checked."""
    progress = tqdm(records, desc=title, disable=not sys.stderr.isatty(), leave=False)
    return [_find(embedder, record, settings, images) for record in progress]


def _find(embedder: Embedder, record: Record, settings: GeneratorConfig, images: ImagesConfig) -> Detections | None:
    try:
        pixels = read_image(record.path, record.size, images)
    except Defect as defect:
        tqdm.write(f"skipped {record.file_name}: {defect.message}", file=sys.stderr)
        return None
    embedding = embedder.embed_image(picture_key(record.digest, record.size), pixels)
    masks = generate_masks(embedder.model, pixels, settings, embedding)
    return Detections(masks.rles, masks.scores.tolist())
