"""`--mode evaluate`: measure weights on a labelled dataset, beside those that they came from."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from finestsam.allocator import keep_freed_memory
from finestsam.config import CHUNK_OBJECTS, GENERATOR_DEFAULTS, Config, GeneratorConfig, ModelConfig, PromptsConfig
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.index import Record
from finestsam.data.loaders import build_validation_loader
from finestsam.data.read import describe_dataset, read_evaluation_set
from finestsam.data.report import write_report
from finestsam.download import hash_file
from finestsam.errors import UserError, printable
from finestsam.evaluation.candidates import find_candidates
from finestsam.evaluation.clicks import measure_clicks
from finestsam.evaluation.generator_scores import choose_grids, find_all, list_fixed, tune
from finestsam.evaluation.measurement import Difference, Measurement, compare
from finestsam.evaluation.prompt_scores import ObjectScore, score_batches
from finestsam.evaluation.report import REPORT_NAME, Story, write_report_page
from finestsam.evaluation.result_files import read_results
from finestsam.evaluation.semantic import evaluate_classes
from finestsam.model.load import LoadedModel, load_model
from finestsam.output_folder import make_output_folder
from finestsam.prediction.generator import resolve_generator
from finestsam.prediction.precompute import Embedder, fill_store, open_store

PROMPT_KINDS = {
    "point": PromptsConfig(use_points=True),
    "box": PromptsConfig(use_points=False, use_boxes=True, box_jitter_ratio=0.0),
}
# On the screen, in this order.
HEADLINES = (
    "generator/ap", "generator/ar_100", "generator/ar_1000", "generator/f1", "point/iou", "point/best_iou", "box/iou",
    "clicks/iou_8",
)  # fmt: skip
FIGURES_NAME, PICTURES_NAME = "evaluation.json", "per_image.csv"


def evaluate(config: Config) -> int:
    """Measure what the weights find on their own, and what they answer to one point and one box per object.

    Writes `evaluation.json` (`generator/ap`, `point/iou`, ..., the same of the model compared with under `floor/`, and
    the differences with their intervals), `per_image.csv` and `report.html` into out_dir.
    """
    if config.keep_memory:
        keep_freed_memory()
    folder = make_output_folder(Path(config.out_dir), config.dataset.path)
    data = read_evaluation_set(config.dataset, config.evaluate.split)
    if config.strict:
        data.refuse_defects()
    if not any(record.annotations for record in data.val):
        raise UserError(f"dataset {config.dataset.path}: no picture with objects to evaluate on")
    write_report(folder / "dataset_report.json", describe_dataset(data.report, data.val))
    print("\n".join([f"layout: {data.layout}", *data.report.list_lines()]))
    if config.evaluate.predictions:
        found = read_results(Path(config.evaluate.predictions), data.val)
        print(f"results: {printable(config.evaluate.predictions)}; {len(data.val)} images")
        ours = Measurement(data.val, {}, found)
        rival = find_rival(config, None)
    else:
        loaded = load_model(config, prefer_runs=True)
        print(f"weights: {printable(loaded.source)} ({loaded.model_type}); {len(data.val)} images")
        if loaded.model.semantic_head is not None:
            return evaluate_classes(config, loaded, data, folder)
        rival = find_rival(config, loaded)
        ours = measure_model(config, loaded, data.val, "weights")
    theirs = None
    if rival:
        print(f"compared with: {printable(rival.source)} ({rival.model_type})")
        theirs = measure_model(config, rival, data.val, "compared with")
    differences = compare(ours, theirs, config.seed_device or 0) if theirs else {}
    rows, their_rows = ours.list_pictures(), theirs.list_pictures() if theirs else None
    print("\n".join(_list_headlines(ours, theirs, differences)))
    worse = _list_worse(rows, their_rows) if their_rows else []
    if their_rows:
        names = ", ".join(printable(name) for name in worse[:10]) + (", ..." if len(worse) > 10 else "")
        print(f"worse than the other on {len(worse)} of {len(rows)} pictures{': ' if worse else ''}{names}")
    _write_figures(folder / FIGURES_NAME, ours, theirs, differences)
    _write_pictures(folder / PICTURES_NAME, rows, their_rows)
    name = config.evaluate.predictions or loaded.source
    story = Story(name, ours, rival.source if rival else "", theirs, differences)
    write_report_page(folder / REPORT_NAME, story, worse, config)
    print(f"figures: {folder / FIGURES_NAME}, picture by picture: {folder / PICTURES_NAME}")
    print(f"report: {folder / REPORT_NAME}")
    return 0


def find_rival(config: Config, loaded: LoadedModel | None) -> LoadedModel | None:
    """Return the model to compare with, or None.

    Args:
        loaded: whose origin is meant where nothing is named; None: results of another program, which have none.
    """
    name = config.evaluate.against
    if name == "auto":
        name = _find_origin(loaded) if loaded else None
    if name in (None, "none"):
        return None
    other = replace(config, model=ModelConfig(checkpoint=str(name)))
    return load_model(other, prefer_runs=True, device=loaded.model.device if loaded else None)


def _find_origin(loaded: LoadedModel) -> str | None:
    """Return the file that these weights were trained from, if it is still there as it was."""
    card = loaded.card
    if card is None or card.started_from_sha256 is None:
        return None
    path = Path(card.started_from)
    if not path.is_file() or hash_file(path) != card.started_from_sha256:
        print(
            f"no comparison: {printable(path)}, which these weights were trained from, is not there any more; "
            "--evaluate.against FILE names another place"
        )
        return None
    return str(path)


def measure_model(config: Config, loaded: LoadedModel, records: Sequence[Record], title: str) -> Measurement:
    """Measure one model on the pictures; those that broke since they were checked are left out."""
    embedder = Embedder(loaded.model, open_store(config.store, loaded.model))
    labelled = [record for record in records if record.annotations]
    prompted = {
        kind: _score(config, loaded, embedder, labelled, prompts, f"{title}, {kind}")
        for kind, prompts in PROMPT_KINDS.items()
    }
    clicks = _measure_clicks(config, loaded, embedder, labelled, f"{title}, clicks") if config.evaluate.clicks else {}
    if not config.evaluate.generator:
        return Measurement(records, prompted, None, clicks)
    settings = resolve_generator(config.generator, loaded.card)
    if config.evaluate.search:
        return _measure_tuned(config, embedder, records, settings, prompted, clicks, f"{title}, generator")
    found = find_all(embedder, records, settings, config.dataset.images, f"{title}, generator")
    pairs = [(record, one) for record, one in zip(records, found, strict=True) if one is not None]
    return Measurement([record for record, _ in pairs], prompted, [one for _, one in pairs], clicks)


def _measure_tuned(
    config: Config,
    embedder: Embedder,
    records: Sequence[Record],
    start: GeneratorConfig,
    prompted: dict[str, list[ObjectScore]],
    clicks: dict[int, float],
    title: str,
) -> Measurement:
    """Measure the generator with thresholds chosen on these pictures, and say them."""
    fixed = list_fixed(config.generator)
    found = find_candidates(embedder, records, start, choose_grids(start, fixed), config.dataset.images, title)
    pairs = [(record, one) for record, one in zip(records, found, strict=True) if one is not None]
    known, candidates = [record for record, _ in pairs], [one for _, one in pairs]
    tuned = tune(known, candidates, start, fixed, config.evaluate.goal)
    chosen = {name: getattr(tuned.result.settings, name) for name in GENERATOR_DEFAULTS}
    flags = " ".join(f"--generator.{name} {value}" for name, value in chosen.items())
    print(f"{title}: best for {config.evaluate.goal} on these pictures: {flags}")
    extra = {f"generator/{name}": float(value) for name, value in chosen.items()}
    if tuned.calibration:
        extra["generator/calibration_error"] = tuned.calibration.error
    return Measurement(known, prompted, tuned.found, clicks, extra, tuned.calibration)


def _measure_clicks(
    config: Config, loaded: LoadedModel, embedder: Embedder, records: list[Record], title: str
) -> dict[int, float]:
    """Correct the model on every object, click by click."""
    loader = _load(config, loaded, embedder, records, PROMPT_KINDS["point"])
    batches = tqdm(loader, desc=title, disable=not sys.stderr.isatty(), leave=False)
    return measure_clicks(embedder, batches, config.chunk_objects or CHUNK_OBJECTS, config.evaluate.clicks)


def _score(
    config: Config, loaded: LoadedModel, embedder: Embedder, records: list[Record], prompts: PromptsConfig, title: str
) -> list[ObjectScore]:
    """Ask for every object with one prompt of a kind."""
    loader = _load(config, loaded, embedder, records, prompts)
    batches = tqdm(loader, desc=title, disable=not sys.stderr.isatty(), leave=False)
    return score_batches(embedder, batches, config.chunk_objects or CHUNK_OBJECTS)


def _load(
    config: Config, loaded: LoadedModel, embedder: Embedder, records: list[Record], prompts: PromptsConfig
) -> DataLoader:
    """Return the loader of pictures with prompts of a kind, their embeddings in the store."""
    settings = SampleSettings(
        loaded.model.image_size,
        resolve_generator(config.generator, loaded.card).points_per_side,
        config.seed_device or 0,
        prompts,
        replace(config.dataset, positive_points=1, negative_points=0, background_points=0),
    )
    dataset = SampleDataset(records, settings, store=embedder.store)
    if embedder.store:
        fill_store(embedder, [dataset], config.num_workers)
    return build_validation_loader(dataset, config.num_workers)


def _list_headlines(ours: Measurement, theirs: Measurement | None, differences: dict[str, Difference]) -> list[str]:
    lines = []
    for name in HEADLINES:
        if name not in ours.figures:
            continue
        line = f"{name:<20}{ours.figures[name]:.4f}"
        if name in differences:
            found = differences[name]
            line += f"   against {theirs.figures[name]:.4f}   {found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        lines.append(line)
    return lines


def _list_worse(rows: list[dict], their_rows: list[dict]) -> list[str]:
    """Return the pictures whose objects one point finds worse than before, the most so first."""
    before = {row["file_name"]: row.get("point/iou") for row in their_rows}
    losses = []
    for row in rows:
        now, then = row.get("point/iou"), before.get(row["file_name"])
        if now is not None and then is not None and now < then:
            losses.append((now - then, row["file_name"]))
    return [name for _, name in sorted(losses)]


def _write_figures(
    path: Path, ours: Measurement, theirs: Measurement | None, differences: dict[str, Difference]
) -> None:
    figures = dict(ours.figures)
    if theirs:
        figures |= {f"floor/{name}": value for name, value in theirs.figures.items()}
    for name, found in differences.items():
        figures[f"difference/{name}"] = found.value
        figures[f"difference/{name}_low"], figures[f"difference/{name}_high"] = found.low, found.high
    path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_pictures(path: Path, rows: list[dict], their_rows: list[dict] | None) -> None:
    if their_rows:
        shared = ("file_name", "objects")
        rows = [
            row | {f"floor/{name}": value for name, value in other.items() if name not in shared}
            for row, other in zip(rows, their_rows, strict=True)
        ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
