"""`--mode evaluate`: measure weights on a labelled dataset, beside those that they came from."""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finestsam.config import CHUNK_OBJECTS, Config, GeneratorConfig, ModelConfig
from finestsam.data.fingerprint import count_learnt
from finestsam.data.index import Record
from finestsam.data.read import describe_dataset, read_evaluation_set, refuse_unread
from finestsam.data.report import write_report
from finestsam.data.semantic import ClassTable
from finestsam.download import hash_file
from finestsam.errors import UserError, printable
from finestsam.evaluation.battery import Battery
from finestsam.evaluation.candidates import find_candidates
from finestsam.evaluation.class_matching import match_categories, refuse_strangers
from finestsam.evaluation.class_scores import describe_categories
from finestsam.evaluation.clicks import average_clicks
from finestsam.evaluation.comparison import COMPARISON_NAME, draw_comparison
from finestsam.evaluation.generator_scores import choose_grids, find_all, list_fixed, tune
from finestsam.evaluation.history import read_history
from finestsam.evaluation.measurement import Difference, Measurement, compare, keep_common
from finestsam.evaluation.report import REPORT_NAME, write_report_page
from finestsam.evaluation.result_files import read_results
from finestsam.evaluation.semantic import evaluate_classes
from finestsam.evaluation.story import Story
from finestsam.images import write_image
from finestsam.model.load import LoadedModel, load_model
from finestsam.out_of_memory import naming_what_needs_less
from finestsam.output_folder import claim_output_folder
from finestsam.prediction.generator import resolve_generator
from finestsam.prediction.precompute import Embedder, open_store
from finestsam.processor import set_processor
from finestsam.whole_files import write_json, write_text

# On the screen, in this order.
HEADLINES = (
    "generator/ap", "generator/ar_100", "generator/ar_1000", "generator/f1", "classes/ap", "classes/ar_100",
    "point/iou", "point/best_iou", "box/iou", "clicks/iou_8", "background/score", "background/taken_share",
)  # fmt: skip
FIGURES_NAME, PICTURES_NAME, DATASET_NAME = "evaluation.json", "per_image.csv", "dataset_report.json"
OUTPUT_NAMES = (FIGURES_NAME, PICTURES_NAME, DATASET_NAME, REPORT_NAME, COMPARISON_NAME)


def evaluate(config: Config) -> int:
    """Measure what the weights find on their own, and what they answer to points and boxes.

    Writes `evaluation.json` (`generator/ap`, `point/iou`, ..., the same of the model compared with under `floor/`, and
    the differences with their intervals), `per_image.csv` and `report.html` into out_dir.
    """
    set_processor(config)
    folder = claim_output_folder(Path(config.out_dir), config.dataset.path, OUTPUT_NAMES)
    data = read_evaluation_set(config.dataset, config.evaluate.split)
    if config.strict:
        data.refuse_defects()
    if not any(record.annotations for record in data.val):
        raise UserError(f"dataset {config.dataset.path}: no picture with objects to evaluate on")
    write_report(folder / DATASET_NAME, describe_dataset(data.report, data.val))
    print("\n".join([f"layout: {data.layout}", *data.report.list_lines()]))
    history = None
    if config.evaluate.predictions:
        found, table = read_results(Path(config.evaluate.predictions), data.val, data.category_names, config.task)
        print(f"results: {printable(config.evaluate.predictions)}; {len(data.val)} images")
        ours = Measurement(data.val, found, table=table)
        rival = find_rival(config, None)
    else:
        loaded = load_model(config, prefer_runs=True)
        print(f"weights: {printable(loaded.source)} ({loaded.model_type}); {len(data.val)} images")
        learnt = count_learnt(data.val, loaded.path.parent) if loaded.path else 0
        if learnt:
            print(f"warning: {learnt} of these images were trained on: new ones will fare worse", file=sys.stderr)
        if loaded.model.semantic_head is not None:
            return evaluate_classes(config, loaded, data, folder)
        table = match_categories(loaded, data)
        if table:
            refuse_strangers(table, data.category_names, loaded.source)
        rival = find_rival(config, loaded)
        ours, history = measure_model(config, loaded, data.val, "weights", table), read_history(loaded)
    theirs = None
    if rival:
        print(f"compared with: {printable(rival.source)} ({rival.model_type})")
        theirs = measure_model(config, rival, data.val, "compared with", match_categories(rival, data))
        ours, theirs = keep_common(ours, theirs)
    refuse_unread(config.dataset, len(ours.records))
    differences = compare(ours, theirs, config.seed_device or 0) if theirs else {}
    rows, their_rows = ours.list_pictures(), theirs.list_pictures() if theirs else None
    print("\n".join([*_list_headlines(ours, theirs, differences), *describe_categories(ours.by_class)]))
    worse = _list_worse(rows, their_rows) if their_rows else []
    if their_rows:
        names = ", ".join(printable(name) for name in worse[:10]) + (", ..." if len(worse) > 10 else "")
        print(f"worse than the other on {len(worse)} of {len(rows)} pictures{': ' if worse else ''}{names}")
    _write_figures(folder / FIGURES_NAME, ours, theirs, differences)
    _write_pictures(folder / PICTURES_NAME, rows, their_rows)
    name = config.evaluate.predictions or loaded.source
    story = Story(name, ours, rival.source if rival else "", theirs, differences, history)
    write_report_page(folder / REPORT_NAME, story, worse, config)
    comparison = draw_comparison(story, config)
    if comparison is not None:
        write_image(folder / COMPARISON_NAME, comparison)
    print(f"figures: {folder / FIGURES_NAME}, picture by picture: {folder / PICTURES_NAME}")
    print(f"report: {folder / REPORT_NAME}" + (f", {folder / COMPARISON_NAME}" if comparison is not None else ""))
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
    task = config.task if config.task == "masks" else "auto"  # what it was trained for, like ours or not
    other = replace(config, task=task, model=ModelConfig(checkpoint=str(name)))
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


def measure_model(
    config: Config, loaded: LoadedModel, records: Sequence[Record], title: str, table: ClassTable | None
) -> Measurement:
    """Measure one model on the pictures; those that broke since they were checked are left out.

    Args:
        title: of the progress bars.
        table: of the classes that the model gives masks; None: it gives none.
    """
    points, objects = config.generator.points_per_batch, config.chunk_objects or CHUNK_OBJECTS
    advice = f"--generator.points_per_batch below {points}, --chunk_objects below {objects} or a smaller --model.type"
    with naming_what_needs_less(title, advice):
        return _measure_model(config, loaded, records, title, table)


def _measure_model(
    config: Config, loaded: LoadedModel, records: Sequence[Record], title: str, table: ClassTable | None
) -> Measurement:
    embedder = Embedder(loaded.model, open_store(config.store, loaded.model))
    battery = Battery(config, embedder, [record for record in records if record.annotations], title)
    prompted, clicks = battery.score_prompts(), average_clicks(battery.measure_clicks())
    settings = resolve_generator(config.generator, loaded.card)
    if not config.evaluate.generator:
        answered = {score.image_id for scores in prompted.values() for score in scores}
        known = [record for record in records if record.image_id in answered or not record.annotations]
        measured = Measurement(known, None)
    elif config.evaluate.search:
        measured, settings = _tune_generator(config, embedder, records, settings, f"{title}, generator")
    else:
        measured = _run_generator(config, embedder, records, settings, f"{title}, generator")
    background = battery.measure_background(settings.pred_iou_thresh)
    return replace(measured, prompted=prompted, clicks=clicks, background=background, table=table)


def _run_generator(
    config: Config, embedder: Embedder, records: Sequence[Record], settings: GeneratorConfig, title: str
) -> Measurement:
    found = find_all(embedder, records, settings, config.dataset.images, title)
    pairs = [(record, one) for record, one in zip(records, found, strict=True) if one is not None]
    return Measurement([record for record, _ in pairs], [one for _, one in pairs])


def _tune_generator(
    config: Config, embedder: Embedder, records: Sequence[Record], start: GeneratorConfig, title: str
) -> tuple[Measurement, GeneratorConfig]:
    """Measure the generator with thresholds chosen on these pictures, and say them."""
    fixed = list_fixed(config.generator)
    found = find_candidates(embedder, records, start, choose_grids(start, fixed), config.dataset.images, title)
    pairs = [(record, one) for record, one in zip(records, found, strict=True) if one is not None]
    known, candidates = [record for record, _ in pairs], [one for _, one in pairs]
    tuned = tune(known, candidates, start, fixed, config.evaluate.goal)
    flags = " ".join(f"--generator.{name} {value}" for name, value in tuned.chosen.items())
    print(f"{title}: best for {config.evaluate.goal} on these pictures: {flags}")
    extra = {f"generator/{name}": float(value) for name, value in tuned.chosen.items()}
    if tuned.calibration:
        extra["generator/calibration_error"] = tuned.calibration.error
    return Measurement(known, tuned.found, extra=extra, calibration=tuned.calibration), tuned.result.settings


def _list_headlines(ours: Measurement, theirs: Measurement | None, differences: dict[str, Difference]) -> list[str]:
    lines = []
    for name in HEADLINES:
        if name not in ours.figures:
            continue
        line = f"{name:<24}{ours.figures[name]:.4f}"
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
    write_json(path, figures, indent=2)


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
    write_text(path, text.getvalue())
