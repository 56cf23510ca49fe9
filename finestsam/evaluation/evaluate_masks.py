"""Measure what a model's generator finds and what it predicts for prompts, beside the weights that it came from."""

from dataclasses import dataclass, replace
from pathlib import Path

from finestsam.config import Config
from finestsam.data.read import LabelledSet, refuse_unread
from finestsam.data.semantic import ClassTable
from finestsam.errors import UserError, printable
from finestsam.evaluation.class_scores import describe_categories, match_categories
from finestsam.evaluation.comparison import COMPARISON_NAME, render_comparison
from finestsam.evaluation.measurement import Measurement, compare, keep_common
from finestsam.evaluation.measuring import Outcome, measure_generator, measure_model
from finestsam.evaluation.own_run import History, OwnRun, describe_images, read_history
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
from finestsam.evaluation.subject import Subject, are_alike, find_baseline, find_sam_thresholds, find_thresholds
from finestsam.images.files import write_image
from finestsam.model.card import write_card
from finestsam.model.load import LoadedModel

FIGURES_NAME, IMAGES_NAME = "evaluation.json", "per_image.csv"
OUTPUT_NAMES = (FIGURES_NAME, IMAGES_NAME, REPORT_NAME, COMPARISON_NAME)


def evaluate_masks(
    config: Config, loaded: LoadedModel, data: LabelledSet, run: OwnRun | None, folder: Path, table: ClassTable | None
) -> int:
    """Measure a model on the images in `data.val`, and return the exit code.

    Writes `evaluation.json` (`generator/ap`, `point/iou`, ..., the same of the baseline under `baseline/`, and the
    differences with their intervals), `per_image.csv` and `report.html`.

    Args:
        run: that the weights come from; None: it is not known.
        table: of the classes that the model gives masks; None: it gives none.
    """
    subject = Subject(loaded, find_thresholds(config, loaded.card, run.goal if run else ""), "weights")
    ours = measure_model(config, subject, data.val, table)
    print("\n".join(describe_setup(ours.measurement.setup)))
    return _write_outputs(config, _Measured(ours, loaded, read_history(loaded)), data, run, folder)


def evaluate_results(config: Config, data: LabelledSet, folder: Path) -> int:
    """Measure the masks in the file `evaluate.predictions`, of any program, as `evaluate_masks` does a model's."""
    found, table = read_results(Path(config.evaluate.predictions), data.val, data.category_names, config.task)
    print(f"results: {printable(config.evaluate.predictions)}; {len(data.val)} images")
    return _write_outputs(config, _Measured(Outcome(Measurement(data.val, found, table=table))), data, None, folder)


@dataclass(frozen=True)
class _Measured:
    """What is evaluated; of another program's results nothing else is known."""

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
