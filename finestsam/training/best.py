"""Keep the best weights of a run, with their card."""

import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from finestsam import __version__
from finestsam.errors import UserError
from finestsam.model.adapter import write_adapter
from finestsam.model.card import Card, write_card
from finestsam.model.fft_attention import list_blocks
from finestsam.model.heads import head_path, is_kept
from finestsam.model.load import RANDOM_WEIGHTS
from finestsam.model.lora import list_lora, plain_state_dict
from finestsam.model.sam import FinestSam
from finestsam.model.saving import save_weights
from finestsam.tasks.base import Validation
from finestsam.training.run import Run
from finestsam.training.run_folder import RunFolder
from finestsam.training.state import Progress, RunState

ADAPTER_FOLDER = "adapter"
OF_THE_GENERATOR = ("val_generator_", "val_classes_")


def choose_metric(run: Run, progress: Progress) -> str:
    """Return the name of the metric that chooses the best weights."""
    name, task = run.config.best_metric, run.task
    name = task.default_metrics.get(run.config.dataset.labels, task.metric) if name == "auto" else name
    is_measured = run.config.evaluate.generator or not name.startswith(OF_THE_GENERATOR)
    return name if is_measured and name in progress.baseline else task.metric


def rank(run: Run, progress: Progress, metrics: Mapping[str, float]) -> list[float]:
    """Return what weights are compared by: the metric that was chosen, and of equals the task's own.

    What could not be measured, as the weights predict no numbers, is worse than everything.
    """
    return [metrics.get(name, -math.inf) for name in (choose_metric(run, progress), run.task.metric)]


def keep_if_best(
    run: Run, state: RunState, folder: RunFolder, validation: Validation, kept_original: float = 0.0
) -> bool:
    """Save the weights as best.pth where they are better than all before, and return whether they are.

    The baseline is the first to beat.

    Args:
        validation: of these weights.
        kept_original: the share of the baseline's weights in these, for the card.
    """
    progress = state.progress
    ranked = None if run.val_loader is None else rank(run, progress, validation.metrics)
    # Both by the metric of now: a run may be continued with another one.
    is_better = ranked is None or progress.best is None or ranked > rank(run, progress, progress.best)
    progress.evaluations_without_better = 0 if is_better else progress.evaluations_without_better + 1
    if is_better:
        progress.best = None if ranked is None else dict(validation.metrics)
        progress.is_blended = kept_original > 0
    if run.is_first_rank:
        card = _make_card(run, progress, validation, kept_original)
        problem = warn_if_not_saved(lambda: _save_best(run, progress, folder, card, is_better))
        if is_better:
            progress.lost_best = problem
    return is_better


def refuse_lost_best(progress: Progress, folder: RunFolder) -> None:
    """Raise a UserError if best.pth could not be written when its weights were there, or is there no more."""
    if folder.is_first_rank and progress.lost_best:
        raise UserError(f"best.pth does not hold the best weights of the run: {progress.lost_best}")
    if folder.is_first_rank and not folder.best.is_file():
        raise UserError(f"{folder.best} is gone, and with it the best weights of the run{_name_kept(folder)}")


def _name_kept(folder: RunFolder) -> str:
    """Return where other weights of the run are."""
    kept = [folder.path / name for name in folder.top.state_dict() if (folder.path / name).is_file()]
    last = f"the newest ones are in {folder.path / 'last.ckpt'}, for --resume"
    return f"; others are {', '.join(map(str, kept))}; {last}" if kept else f"; {last}"


def _save_best(run: Run, progress: Progress, folder: RunFolder, card: Card, is_better: bool) -> None:
    model = run.loaded.model
    weights = plain_state_dict(model.sam)
    if progress.step > 0:
        path = folder.top.save(weights, progress.step, card.metrics, choose_metric(run, progress))
        if path:
            _save_beside(model, path, card)
    if is_better:
        save_weights(folder.best, weights)
        _save_beside(model, folder.best, card)
        if card.kept_original == 0:
            _save_adapter(run, folder, card)
        else:  # the additions are in the weights of the blend
            shutil.rmtree(folder.path / ADAPTER_FOLDER, ignore_errors=True)


def _save_adapter(run: Run, folder: RunFolder, card: Card) -> None:
    """Save low-rank additions by themselves, too, where there is a file of weights that they go with.

    There is none if FFT attention was mounted in this run: only the best weights hold it.
    """
    model = run.loaded.model
    if not any(list_lora(model.sam)) or card.started_from == RANDOM_WEIGHTS or run.has_new_attention:
        return
    _save_beside(model, write_adapter(folder.path / ADAPTER_FOLDER, model.sam, card.started_from), card)


def _save_beside(model: FinestSam, path: Path, card: Card) -> None:
    for head in filter(is_kept, model.heads.values()):
        save_weights(head_path(path, type(head)), head.state_dict())
    write_card(path, card)


def _make_card(run: Run, progress: Progress, validation: Validation, kept_original: float) -> Card:
    model = run.loaded.model
    return Card(
        model_type=run.loaded.model_type,
        image_size=model.image_size,
        multimask_output=model.multimask_output,
        task=run.task.name,
        generator=validation.generator,
        goal=run.config.evaluate.goal if validation.tuned_on else "",
        tuned_on=validation.tuned_on,
        baseline_generator=progress.baseline_generator,
        metrics=validation.metrics,
        baseline=progress.baseline or validation.metrics,
        step=progress.step,
        started_from=progress.started_from,
        kept_original=kept_original,
        started_from_sha256=progress.started_from_sha256,
        fft_blocks=list_blocks(model.sam.state_dict()),
        finestsam_version=__version__,
        **run.task.describe_card(run.data),
    )


def warn_if_not_saved(save: Callable[[], None]) -> str:
    """Save, and return the problem; if the disk is full, the old files stay complete, and training goes on."""
    try:
        save()
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr)
        return str(error)
    return ""
