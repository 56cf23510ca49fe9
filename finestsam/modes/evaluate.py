"""`--mode evaluate`: measure weights on a labelled dataset, as the task that they were trained for measures them."""

import sys
from pathlib import Path

from finestsam.config import Config
from finestsam.data.read import LabelledSet, describe_dataset, read_evaluation_set
from finestsam.errors import UserError, printable
from finestsam.evaluation.evaluate_masks import OUTPUT_NAMES, evaluate_results
from finestsam.evaluation.own_run import OwnRun, describe_images, find_own_run, warn_of_learned
from finestsam.model.load import LoadedModel, load_model
from finestsam.model.weights import BUILTIN_WEIGHTS
from finestsam.records import write_report
from finestsam.runtime.cpu import set_processor
from finestsam.runtime.folders import claim_output_folder
from finestsam.tasks import build_task_of_weights

DATASET_NAME = "dataset_report.json"


def evaluate(config: Config) -> int:
    """Run the mode and return the exit code.

    Writes the figures of all images and of each, and the report on the dataset, into out_dir.
    """
    set_processor()
    folder = claim_output_folder(Path(config.out_dir), config.dataset.path, (*OUTPUT_NAMES, DATASET_NAME))
    run = find_own_run(config)
    data = _read_images(config, run, folder)
    if config.evaluate.predictions:
        return evaluate_results(config, data, folder)
    loaded = load_model(config, prefer_runs=True)
    task = build_task_of_weights(config, loaded)
    refuse_unwritable_card(config, loaded, task.no_thresholds)
    print(f"weights: {printable(loaded.source)} ({loaded.model_type} at {loaded.model.image_size} pixels)")
    print(f"images: {describe_images(run, data.val)}")
    if warning := warn_of_learned(run, data.val):
        print(f"warning: {warning}", file=sys.stderr)
    return task.evaluate(loaded, data, run, folder)


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


def refuse_unwritable_card(config: Config, loaded: LoadedModel, no_thresholds: str) -> None:
    """Raise a UserError if thresholds shall be stored, and the weights have no card that belongs to the user.

    Args:
        no_thresholds: why weights of this task have no thresholds; empty: they have some.
    """
    if not config.evaluate.store_thresholds:
        return
    reason = ""
    if loaded.path is None or loaded.card is None:
        reason = "they have no description beside them (best.json of a run)"
    elif loaded.path.resolve() in {Path(path).resolve() for path in BUILTIN_WEIGHTS.values()}:
        reason = "they are part of finestsam; copy them and their .json elsewhere first"
    else:
        reason = no_thresholds
    if reason:
        raise UserError(f"evaluate.store_thresholds: {printable(loaded.source)}: {reason}")
