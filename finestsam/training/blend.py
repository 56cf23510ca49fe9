"""Put some of the weights that training started from back into the best ones, where that validates better.

On a straight line between the two lie models that forget less and still know what is new: Wortsman et al., Robust
fine-tuning of zero-shot models (arXiv 2109.01903).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from finestsam.model.card import read_card
from finestsam.model.heads import head_path, is_kept
from finestsam.model.lora import is_lora, list_lora, load_plain_
from finestsam.model.sam import FinestSam
from finestsam.model.saving import save_weights
from finestsam.tasks.base import Validation
from finestsam.training.best import keep_if_best, rank
from finestsam.training.run import Run
from finestsam.training.run_folder import RunFolder
from finestsam.training.state import Progress, RunState

START_NAME = "start.pth"
SHARES = (0.1, 0.2, 0.3, 0.5)


def keep_start(run: Run, folder: RunFolder) -> None:
    """Write what will train as it is before the first step, for a run that will put some of it back."""
    if run.config.opt.keep_original == 0 or not run.is_first_rank:
        return
    sam = run.loaded.model.sam
    trained = {name for name, weight in sam.named_parameters() if weight.requires_grad and not is_lora(name)}
    trained |= {f"{name}.weight" for name, _ in list_lora(sam)}
    weights = sam.state_dict()
    save_weights(folder.path / START_NAME, {name: weights[name] for name in sorted(trained)})


def wants_blend(run: Run, progress: Progress) -> bool:
    """Whether original weights are to be put back into the best ones, and that is not done yet."""
    wanted = run.config.opt.keep_original
    return wanted != 0 and (wanted != "auto" or run.val_loader is not None) and not progress.is_blended


def blend_best(run: Run, state: RunState, folder: RunFolder, validate: Callable[[Run], Validation]) -> None:
    """Try the shares that the settings ask for on the best weights; what validates better becomes best.pth.

    A share that is given is taken if the blend is at least better than the baseline, whatever the best weights alone
    were.

    Raises:
        Interrupted: a signal came; best.pth is as it was, so that all shares can be tried again.
    """
    progress, sam = state.progress, run.loaded.model.sam
    run.fabric.barrier()
    start = torch.load(folder.path / START_NAME, map_location="cpu", weights_only=True)
    best = torch.load(folder.best, map_location="cpu", weights_only=True)
    last = _copy_state(run.loaded.model)
    _load_best_heads_(run.loaded.model, folder)
    limit, chosen = _find_limit(run, progress), None
    for share in _list_shares(run, folder, start, best):
        load_plain_(sam, blend(start, best, share))
        validation = validate(run)
        ranked = rank(run, progress, validation.metrics)
        is_better = limit is None or ranked > limit
        if is_better:
            limit, chosen = ranked, (share, validation)
        run.fabric.print(f"with {share:g} of the original weights: {'better' if is_better else 'no better'}")
    if chosen:
        share, validation = chosen
        progress.best = None  # it is better than what it was to beat
        load_plain_(sam, blend(start, best, share))
        keep_if_best(run, state, folder, validation, kept_original=share)
    run.loaded.model.load_state_dict(last)
    progress.is_blended = True


def _find_limit(run: Run, progress: Progress) -> list[float] | None:
    """Return the rank that a blend has to beat; None: any blend will do."""
    to_beat = progress.best
    if run.config.opt.keep_original != "auto" and run.val_loader is not None:
        to_beat = progress.baseline
    return None if to_beat is None else rank(run, progress, to_beat)


def _copy_state(model: FinestSam) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _load_best_heads_(model: FinestSam, folder: RunFolder) -> None:
    """Take the heads that belong to the best weights: the blends of those are measured and saved with them."""
    for head in filter(is_kept, model.heads.values()):
        head.load_state_dict(torch.load(head_path(folder.best, type(head)), weights_only=True))


def _list_shares(run: Run, folder: RunFolder, start: dict[str, Tensor], best: dict[str, Tensor]) -> tuple[float, ...]:
    if all(torch.equal(start[name], best[name]) for name in start):
        return ()  # no epoch was better than the start
    card = read_card(folder.best)
    if card and card.kept_original > 0:
        return ()  # they are a blend already: the run was killed before it could note that
    wanted = run.config.opt.keep_original
    return SHARES if wanted == "auto" else (wanted,)


def blend(start: dict[str, Tensor], best: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return the weights on the line from `best`, share 0, to `start`, share 1; the rest did not train."""
    return {name: torch.lerp(value, start[name], share) if name in start else value for name, value in best.items()}
