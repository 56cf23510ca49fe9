"""`--mode evaluate`: measure weights on a labelled dataset, and compare them with the baseline."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from finestsam.config import Config
from finestsam.data.read import LabelledSet, describe_dataset, read_evaluation_set, refuse_unread
from finestsam.errors import UserError, printable
from finestsam.evaluation.class_scores import describe_categories, match_categories, refuse_strangers
from finestsam.evaluation.comparison import COMPARISON_NAME, render_comparison
from finestsam.evaluation.measurement import Measurement, compare, keep_common
from finestsam.evaluation.measuring import Outcome, measure_generator, measure_model
from finestsam.evaluation.own_run import History, OwnRun, describe_images, find_own_run, read_history, warn_of_learned
from finestsam.evaluation.report import REPORT_NAME, write_report_page
from finestsam.evaluation.result import (
    Evaluation,
    describe_setup,
    describe_worse,
    list_headlines,
    write_figures,
    write_images,
)
from finestsam.evaluation.result_files import read_results
from finestsam.evaluation.semantic import evaluate_classes
from finestsam.evaluation.subject import Subject, are_alike, find_baseline, find_sam_thresholds, find_thresholds
from finestsam.images.files import write_image
from finestsam.model.card import write_card
from finestsam.model.load import LoadedModel, load_model
from finestsam.model.weights import BUILTIN_WEIGHTS
from finestsam.records import write_report
from finestsam.runtime.cpu import set_processor
from finestsam.runtime.folders import claim_output_folder

FIGURES_NAME, IMAGES_NAME, DATASET_NAME = "evaluation.json", "per_image.csv", "dataset_report.json"
OUTPUT_NAMES = (FIGURES_NAME, IMAGES_NAME, DATASET_NAME, REPORT_NAME, COMPARISON_NAME)


def evaluate(config: Config) -> int:
    """Measure the weights' generator, and their masks for points and boxes.

    Writes `evaluation.json` (`generator/ap`, `point/iou`, ..., the same of the baseline under `baseline/`, and the
    differences with their intervals), `per_image.csv` and `report.html` into out_dir.
    """
    set_processor()
    folder = claim_output_folder(Path(config.out_dir), config.dataset.path, OUTPUT_NAMES)
    run = find_own_run(config)
    data = _read_images(config, run, folder)
    if config.evaluate.predictions:
        found, table = read_results(Path(config.evaluate.predictions), data.val, data.category_names, config.task)
        print(f"results: {printable(config.evaluate.predictions)}; {len(data.val)} images")
        return _write_outputs(config, _Measured(Outcome(Measurement(data.val, found, table=table))), data, None, folder)
    loaded = load_model(config, prefer_runs=True)
    refuse_unwritable_card(config, loaded)
    print(f"weights: {printable(loaded.source)} ({loaded.model_type} at {loaded.model.image_size} pixels)")
    print(f"images: {describe_images(run, data.val)}")
    if warning := warn_of_learned(run, data.val):
        print(f"warning: {warning}", file=sys.stderr)
    if loaded.model.semantic_head is not None:
        return evaluate_classes(config, loaded, data, run, folder)
    table = match_categories(loaded, data)
    if table:
        refuse_strangers(table, data.category_names, loaded.source)
    subject = Subject(loaded, find_thresholds(config, loaded.card, run.goal if run else ""), "weights")
    ours = measure_model(config, subject, data.val, table)
    print("\n".join(describe_setup(ours.measurement.setup)))
    return _write_outputs(config, _Measured(ours, loaded, read_history(loaded)), data, run, folder)


def _read_images(config: Config, run: OwnRun | None, folder: Path) -> LabelledSet:
    """Return the images to evaluate on, in `val`, and write the report on the dataset."""
    data = read_evaluation_set(config.dataset, config.evaluate.split, run.sides if run else None)
    if config.strict:
        data.refuse_defects()
    if not any(record.annotations for record in data.val):
        raise UserError(f"dataset {config.dataset.path}: no image with objects to evaluate on")
    write_report(folder / DATASET_NAME, describe_dataset(data.report, data.val))
    print("\n".join([f"layout: {data.layout}", *data.report.list_lines()]))
    return data


@dataclass(frozen=True)
class _Measured:
    """What is evaluated; for results of another program `loaded` and `history` are None."""

    outcome: Outcome
    loaded: LoadedModel | None = None
    history: History | None = None


def _write_outputs(config: Config, ours: _Measured, data: LabelledSet, run: OwnRun | None, folder: Path) -> int:
    """Measure the baseline, print and write everything, and store the thresholds if the settings say so."""
    baseline = find_baseline(config, ours.loaded, run.goal if run else "")
    theirs, sam = _measure_baseline(config, baseline, data) if baseline else (None, None)
    evaluation = _collect_evaluation(config, ours, theirs, sam, run)
    refuse_unread(config.dataset, len(evaluation.ours.records))
    print("\n".join([*list_headlines(evaluation), *describe_categories(evaluation.ours.by_class)]))
    if evaluation.baseline:
        print(describe_worse(evaluation))
    write_figures(folder / FIGURES_NAME, evaluation)
    write_images(folder / IMAGES_NAME, evaluation)
    write_report_page(folder / REPORT_NAME, evaluation, config)
    comparison = render_comparison(evaluation, config)
    if comparison is not None:
        write_image(folder / COMPARISON_NAME, comparison)
    print(f"figures: {folder / FIGURES_NAME}, image by image: {folder / IMAGES_NAME}")
    if comparison is not None:
        print(f"images: {folder / COMPARISON_NAME}")
    if config.evaluate.store_thresholds:
        path = store_thresholds(ours.loaded, config.evaluate.goal, ours.outcome, theirs)
        print(f"thresholds stored: {printable(path)}")
    print(f"{evaluation.summarize()} Report: {folder / REPORT_NAME}")
    return 0


def _measure_baseline(config: Config, baseline: Subject, data: LabelledSet) -> tuple[Outcome, Measurement | None]:
    """Return the baseline, and the baseline with SAM's own thresholds where these give clearly different masks."""
    loaded = baseline.loaded
    print(f"baseline: {printable(loaded.source)} ({loaded.model_type} at {loaded.model.image_size} pixels)")
    table = match_categories(loaded, data)
    outcome = measure_model(config, baseline, data.val, table)
    print("\n".join(describe_setup(outcome.measurement.setup)))
    thresholds = find_sam_thresholds(config)
    setup = outcome.measurement.setup
    if setup.thresholds is None or setup.thresholds.settings == thresholds.settings:
        return outcome, None
    known = outcome.measurement.records
    sam = measure_generator(config, baseline, known, thresholds, table)
    is_telling = len(sam.records) == len(known) and not are_alike(outcome.measurement.found, sam.found)
    return outcome, sam if is_telling else None


def _collect_evaluation(
    config: Config, ours: _Measured, theirs: Outcome | None, sam: Measurement | None, run: OwnRun | None
) -> Evaluation:
    """Return all measurements, on the images that all models were measured on."""
    name = config.evaluate.predictions or ours.loaded.source
    mine, other, differences = ours.outcome.measurement, None, None
    if theirs:
        mine, other = keep_common(mine, theirs.measurement)
        sam = sam.keep({record.image_id for record in mine.records}) if sam else None
        differences = compare(mine, other, config.seed_device or 0)
    return Evaluation(
        name=name,
        ours=mine,
        baseline_name=other.setup.name if other else "",
        baseline=other,
        differences=differences,
        history=ours.history,
        sam_thresholds=sam,
        learned=frozenset(run.list_learned(mine.records) if run else ()),
        described_images=describe_images(run, mine.records),
    )


def refuse_unwritable_card(config: Config, loaded: LoadedModel) -> None:
    """Raise a UserError if thresholds shall be stored, and the weights have no card that belongs to the user."""
    if not config.evaluate.store_thresholds:
        return
    reason = ""
    if loaded.path is None or loaded.card is None:
        reason = "they have no description beside them (best.json of a run)"
    elif loaded.path.resolve() in {Path(path).resolve() for path in BUILTIN_WEIGHTS.values()}:
        reason = "they are part of finestsam; copy them and their .json elsewhere first"
    elif loaded.model.semantic_head is not None:
        reason = "they are for classes of pixels, which no threshold decides about"
    if reason:
        raise UserError(f"evaluate.store_thresholds: {printable(loaded.source)}: {reason}")


def store_thresholds(loaded: LoadedModel, goal: str, ours: Outcome, baseline: Outcome | None) -> Path:
    """Write the thresholds of both models and what they were tuned for into the card, and return its path.

    Raises:
        UserError: it cannot be written.
    """
    card = replace(
        loaded.card,
        generator=ours.tuned,
        goal=goal,
        tuned_on=ours.tuned_on,
        # Older ones would be for another goal or other images.
        baseline_generator=(baseline.tuned or {}) if baseline else {},
    )
    path = loaded.path.with_suffix(".json")
    try:
        write_card(loaded.path, card)
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be written: {error.strerror or error}") from None
    return path
