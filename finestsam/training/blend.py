"""Put some of the weights that training started from back into the best ones, where that validates better.

On a straight line between the two lie models that forget less and still know what is new: Wortsman et al., Robust
fine-tuning of zero-shot models (arXiv 2109.01903).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from finestsam.model.card import read_card
from finestsam.model.heads import head_path
from finestsam.model.lora import is_lora, list_lora, load_plain_
from finestsam.model.sam import FinestSam
from finestsam.model.saving import save_weights
from finestsam.training.best import keep_if_best, rank
from finestsam.training.run import Run

START_NAME = "start.pth"
SHARES = (0.1, 0.2, 0.3, 0.5)


def keep_start(run: Run) -> None:
    """Write what will train as it is before the first step, for a run that will put some of it back."""
    if run.config.opt.keep_original == 0 or not run.is_first_rank:
        return
    sam = run.loaded.model.sam
    trained = {name for name, weight in sam.named_parameters() if weight.requires_grad and not is_lora(name)}
    trained |= {f"{name}.weight" for name, _ in list_lora(sam)}
    weights = sam.state_dict()
    save_weights(run.folder / START_NAME, {name: weights[name] for name in sorted(trained)})


def wants_blend(run: Run) -> bool:
    """Whether original weights are to be put back into the best ones, and that is not done yet."""
    wanted = run.config.opt.keep_original
    return wanted != 0 and (wanted != "auto" or run.val_loader is not None) and not run.progress.is_blended


def blend_best(run: Run, validate: Callable[[Run], None]) -> None:
    """Try the shares that the settings ask for on the best weights; what validates better becomes best.pth.

    A share that is given is taken if the blend is at least better than the baseline, whatever the best weights
    alone were.

    Raises:
        Interrupted: a signal came; best.pth is as it was, so that all shares can be tried again.
    """
    progress, sam, wanted = run.progress, run.loaded.model.sam, run.config.opt.keep_original
    run.fabric.barrier()
    start = torch.load(run.folder / START_NAME, map_location="cpu", weights_only=True)
    best = torch.load(run.folder / "best.pth", map_location="cpu", weights_only=True)
    last = _copy_state(run.loaded.model)
    _load_best_head_(run)
    found = progress.metrics, progress.generator, progress.validation_seconds
    to_beat = progress.baseline if wanted != "auto" and run.val_loader is not None else progress.best
    limit = None if to_beat is None else rank(run, to_beat)
    chosen = None
    for share in _list_shares(run, start, best):
        load_plain_(sam, blend(start, best, share))
        validate(run)
        ranked = rank(run, progress.metrics)
        is_better = limit is None or ranked > limit
        if is_better:
            limit, chosen = ranked, (share, progress.metrics, progress.generator)
        run.fabric.print(f"with {share:g} of the original weights: {'better' if is_better else 'no better'}")
    if chosen:
        share, progress.metrics, progress.generator = chosen
        progress.best = None  # it is better than what it was to beat
        load_plain_(sam, blend(start, best, share))
        keep_if_best(run, kept_original=share)
    run.loaded.model.load_state_dict(last)
    progress.metrics, progress.generator, progress.validation_seconds = found
    progress.is_blended = True


def _copy_state(model: FinestSam) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _load_best_head_(run: Run) -> None:
    """Take the class head that belongs to the best weights: the blends of those are judged and saved with it."""
    head = run.loaded.model.class_head
    if head is not None:
        head.load_state_dict(torch.load(head_path(run.folder / "best.pth", type(head)), weights_only=True))


def _list_shares(run: Run, start: dict[str, Tensor], best: dict[str, Tensor]) -> tuple[float, ...]:
    if all(torch.equal(start[name], best[name]) for name in start):
        return ()  # no epoch was better than the start
    card = read_card(run.folder / "best.pth")
    if card and card.kept_original > 0:
        return ()  # they are a blend already: the run was killed before it could note that
    wanted = run.config.opt.keep_original
    return SHARES if wanted == "auto" else (wanted,)


def blend(start: dict[str, Tensor], best: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return the weights on the line from `best`, share 0, to `start`, share 1; the rest did not train."""
    return {name: torch.lerp(value, start[name], share) if name in start else value for name, value in best.items()}
