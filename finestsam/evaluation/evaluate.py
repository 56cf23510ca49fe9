"""`--mode evaluate`: measure weights on a labelled dataset."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from finestsam.config import Config, PromptsConfig
from finestsam.data.coco import Record
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.loaders import build_validation_loader
from finestsam.data.read import read_evaluation_set
from finestsam.errors import UserError
from finestsam.evaluation.prompt_scores import score_batches, summarize_scores
from finestsam.model.load import LoadedModel, load_model
from finestsam.prediction.generator import resolve_generator

PROMPT_KINDS = {
    "point": PromptsConfig(use_points=True),
    "box": PromptsConfig(use_points=False, use_boxes=True, box_jitter_ratio=0.0),
}


def evaluate(config: Config) -> int:
    """Measure the masks that one point and one box per object give, and write `evaluation.json` into out_dir."""
    data = read_evaluation_set(config.dataset)
    if config.strict:
        data.refuse_defects()
    records = [record for record in data.val if record.annotations]
    if not records:
        raise UserError(f"dataset {config.dataset.path}: no picture with objects to evaluate on")
    loaded = load_model(config, prefer_runs=True)
    print("\n".join([f"layout: {data.layout}", data.report.summarize(), *data.report.list_examples()]))
    print(f"weights: {loaded.source} ({loaded.model_type}); {len(records)} images")
    metrics: dict[str, float] = {}
    for kind, prompts in PROMPT_KINDS.items():
        scores = _score(config, loaded, records, prompts, kind)
        metrics |= {f"{kind}/{name}": value for name, value in scores.items()}
        print(f"{kind}: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f}, best mask's IoU {scores['best_iou']:.4f}")
    path = Path(config.out_dir) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"figures: {path}")
    return 0


def _score(
    config: Config, loaded: LoadedModel, records: list[Record], prompts: PromptsConfig, title: str
) -> dict[str, float]:
    """Return the means over all objects, each asked for with one prompt of a kind."""
    settings = SampleSettings(
        loaded.model.image_size,
        resolve_generator(config.generator, loaded.card).points_per_side,
        config.seed_device or 0,
        prompts,
        replace(config.dataset, positive_points=1, negative_points=0),
    )
    loader = build_validation_loader(SampleDataset(records, settings), config.num_workers)
    batches = tqdm(loader, desc=title, disable=not sys.stderr.isatty(), leave=False)
    return summarize_scores(score_batches(loaded.model, batches, config.chunk_objects))
