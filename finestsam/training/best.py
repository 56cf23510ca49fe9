"""Keep the best weights of a run, with their card."""

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from finestsam import __version__
from finestsam.data.categories import list_category_ids
from finestsam.errors import UserError
from finestsam.model.adapter import write_adapter
from finestsam.model.card import Card, write_card
from finestsam.model.fft_attention import list_blocks
from finestsam.model.heads import head_path
from finestsam.model.load import RANDOM_WEIGHTS
from finestsam.model.lora import list_lora, plain_state_dict
from finestsam.model.saving import save_weights
from finestsam.training.run import Run

ADAPTER_FOLDER = "adapter"
OF_THE_GENERATOR = ("val_generator_", "val_classes_")


def choose_metric(run: Run) -> str:
    """Return the name of the metric that weights are ranked by."""
    name = run.config.best_metric
    name = run.stepper.default_metrics[run.config.dataset.labels] if name == "auto" else name
    is_measured = run.config.evaluate.generator or not name.startswith(OF_THE_GENERATOR)
    return name if is_measured and name in run.progress.baseline else run.stepper.metric


def rank(run: Run, metrics: dict[str, float]) -> list[float]:
    """Return the values that weights are compared by: the chosen metric, then the task's own for equal ones.

    Weights without a measured value, because their outputs are not finite, rank last.
    """
    return [metrics.get(name, -math.inf) for name in (choose_metric(run), run.stepper.metric)]


def keep_if_best(run: Run, kept_original: float = 0.0) -> bool:
    """Save the weights as best.pth if they are better than all before, the baseline included; return whether they are.

    Args:
        kept_original: share of the starting weights blended into these, for the card.
    """
    progress = run.progress
    ranked = None if run.val_loader is None else rank(run, progress.metrics)
    # Both by the current metric, because a run may continue with another one.
    is_better = ranked is None or progress.best is None or ranked > rank(run, progress.best)
    progress.evaluations_without_better = 0 if is_better else progress.evaluations_without_better + 1
    if is_better:
        progress.best = None if ranked is None else dict(progress.metrics)
        progress.is_blended = kept_original > 0
    if run.is_first_rank:
        problem = warn_if_not_saved(lambda: _save_best(run, is_better, kept_original))
        if is_better:
            progress.lost_best = problem
    return is_better


def refuse_lost_best(run: Run) -> None:
    """Raise a UserError if best.pth is missing, or could not be written when the weights were best."""
    if run.is_first_rank and run.progress.lost_best:
        raise UserError(f"best.pth does not hold the best weights of the run: {run.progress.lost_best}")
    if run.is_first_rank and not (run.folder / "best.pth").is_file():
        raise UserError(f"{run.folder / 'best.pth'} is gone, and with it the best weights of the run{_name_kept(run)}")


def _name_kept(run: Run) -> str:
    """Return where to find other weights of the run."""
    kept = [run.folder / name for name in run.top.state_dict() if (run.folder / name).is_file()]
    last = f"the newest ones are in {run.folder / 'last.ckpt'}, for --resume"
    return f"; others are {', '.join(map(str, kept))}; {last}" if kept else f"; {last}"


def _save_best(run: Run, is_better: bool, kept_original: float) -> None:
    weights, card = plain_state_dict(run.loaded.model.sam), _make_card(run, kept_original)
    if run.progress.step > 0:
        path = run.top.save(weights, run.progress.step, run.progress.metrics, choose_metric(run))
        if path:
            _save_beside(run, path, card)
    if is_better:
        save_weights(run.folder / "best.pth", weights)
        _save_beside(run, run.folder / "best.pth", card)
        if kept_original == 0:
            _save_adapter(run, card)
        else:  # the blended weights contain the LoRA weights
            shutil.rmtree(run.folder / ADAPTER_FOLDER, ignore_errors=True)


def _save_adapter(run: Run, card: Card) -> None:
    """Save the LoRA weights as an adapter as well, if there is a file with their base weights.

    There is none if FFT attention was mounted in this run: only the best weights hold it.
    """
    sam, started_from = run.loaded.model.sam, run.progress.started_from
    if not any(list_lora(sam)) or started_from == RANDOM_WEIGHTS or run.has_new_attention:
        return
    _save_beside(run, write_adapter(run.folder / ADAPTER_FOLDER, sam, started_from), card)


def _save_beside(run: Run, path: Path, card: Card) -> None:
    model = run.loaded.model
    for head in (model.semantic_head, model.class_head):
        if head is not None:
            save_weights(head_path(path, type(head)), head.state_dict())
    write_card(path, card)


def _make_card(run: Run, kept_original: float) -> Card:
    progress, model, table = run.progress, run.loaded.model, run.classes
    has_masks, has_categories = model.semantic_head is None, model.class_head is not None
    return Card(
        model_type=run.loaded.model_type,
        image_size=model.image_size,
        multimask_output=model.multimask_output,
        categories=table.names[1:] if has_categories else run.data.categories,
        category_ids=list_category_ids(table) if has_categories else [],
        generator=progress.generator,
        goal=run.config.evaluate.goal if progress.tuned_on else "",
        tuned_on=progress.tuned_on,
        baseline_generator=progress.baseline_generator,
        metrics=progress.metrics,
        baseline=progress.baseline or progress.metrics,
        step=progress.step,
        started_from=progress.started_from,
        kept_original=kept_original,
        started_from_sha256=progress.started_from_sha256,
        task="classes" if has_categories else "masks" if has_masks else "semantic",
        classes=[] if has_masks else table.names,
        ignores_unlabelled=False if has_masks else table.ignores_unlabelled,
        fft_blocks=list_blocks(model.sam.state_dict()),
        finestsam_version=__version__,
    )


def warn_if_not_saved(save: Callable[[], None]) -> str:
    """Save, and return the problem; if the disk is full, the old files stay complete, and training goes on."""
    try:
        save()
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr)
        return str(error)
    return ""
