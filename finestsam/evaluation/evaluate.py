"""`--mode evaluate`: measure weights on a labelled dataset."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from finestsam.allocator import keep_freed_memory
from finestsam.config import CHUNK_OBJECTS, Config, PromptsConfig
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.index import Record
from finestsam.data.loaders import build_validation_loader
from finestsam.data.read import describe_dataset, read_evaluation_set
from finestsam.data.report import write_report
from finestsam.errors import UserError
from finestsam.evaluation.generator_scores import find_all, score_generator
from finestsam.evaluation.prompt_scores import score_batches, summarize_scores
from finestsam.model.load import LoadedModel, load_model
from finestsam.output_folder import make_output_folder
from finestsam.prediction.generator import resolve_generator
from finestsam.prediction.precompute import Embedder, fill_store, open_store

PROMPT_KINDS = {
    "point": PromptsConfig(use_points=True),
    "box": PromptsConfig(use_points=False, use_boxes=True, box_jitter_ratio=0.0),
}


def evaluate(config: Config) -> int:
    """Measure what the weights find on their own, and what they answer to one point and one box per object.

    Writes `evaluation.json` into out_dir: `generator/ap`, `point/iou`, `box/iou`, ...
    """
    if config.keep_memory:
        keep_freed_memory()
    folder = make_output_folder(Path(config.out_dir), config.dataset.path)
    data = read_evaluation_set(config.dataset)
    if config.strict:
        data.refuse_defects()
    records = [record for record in data.val if record.annotations]
    if not records:
        raise UserError(f"dataset {config.dataset.path}: no picture with objects to evaluate on")
    write_report(folder / "dataset_report.json", describe_dataset(data.report, data.val))
    loaded = load_model(config, prefer_runs=True)
    print("\n".join([f"layout: {data.layout}", *data.report.list_lines()]))
    print(f"weights: {loaded.source} ({loaded.model_type}); {len(records)} images")
    embedder = Embedder(loaded.model, open_store(config.store, loaded.model))
    metrics: dict[str, float] = {}
    for kind, prompts in PROMPT_KINDS.items():
        scores = _score(config, loaded, embedder, records, prompts, kind)
        metrics |= {f"{kind}/{name}": value for name, value in scores.items()}
        print(f"{kind}: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f}, best mask's IoU {scores['best_iou']:.4f}")
    if config.evaluate.generator:
        metrics |= _score_generator(config, loaded, embedder, data.val)
    path = folder / "evaluation.json"
    path.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"figures: {path}")
    return 0


def _score_generator(
    config: Config, loaded: LoadedModel, embedder: Embedder, records: list[Record]
) -> dict[str, float]:
    settings = resolve_generator(config.generator, loaded.card)
    found = find_all(embedder, records, settings, config.dataset.images)
    scores = score_generator(records, found)
    if scores:
        print(
            f"generator: AP {scores['ap']:.4f}, AP50 {scores['ap50']:.4f}, recall of 1000 masks "
            f"{scores['ar_1000']:.4f}, {scores['masks_per_image']:.1f} masks a picture"
        )
    return {f"generator/{name}": value for name, value in scores.items()}


def _score(
    config: Config, loaded: LoadedModel, embedder: Embedder, records: list[Record], prompts: PromptsConfig, title: str
) -> dict[str, float]:
    """Return the means over all objects, each asked for with one prompt of a kind."""
    settings = SampleSettings(
        loaded.model.image_size,
        resolve_generator(config.generator, loaded.card).points_per_side,
        config.seed_device or 0,
        prompts,
        replace(config.dataset, positive_points=1, negative_points=0),
    )
    dataset = SampleDataset(records, settings, store=embedder.store)
    if embedder.store:
        fill_store(embedder, [dataset], config.num_workers)
    loader = build_validation_loader(dataset, config.num_workers)
    batches = tqdm(loader, desc=title, disable=not sys.stderr.isatty(), leave=False)
    return summarize_scores(score_batches(embedder, batches, config.chunk_objects or CHUNK_OBJECTS))
