"""Put some of the weights that training started from back into the best ones, where that validates better.

On a straight line between the two lie models that forget less and still know what is new: Wortsman et al., Robust
fine-tuning of zero-shot models (arXiv 2109.01903).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from finestsam.model.classes import head_path
from finestsam.model.lora import is_lora, list_lora, load_plain_
from finestsam.model.sam import FinestSam
from finestsam.training.best import keep_if_best, rank
from finestsam.training.checkpoint import save_weights
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


def blend_best(run: Run, validate: Callable[[Run], None]) -> None:
    """Try the shares that the settings ask for on the best weights; what validates better becomes best.pth.

    A share that is given is taken if the blend is at least better than the untouched model, whatever the best weights
    alone were.
    """
    wanted, path = run.config.opt.keep_original, run.folder / START_NAME
    if wanted == 0 or (wanted == "auto" and run.val_loader is None):
        return
    run.fabric.barrier()
    start = torch.load(path, map_location="cpu", weights_only=True)
    best = torch.load(run.folder / "best.pth", map_location="cpu", weights_only=True)
    if all(torch.equal(start[name], best[name]) for name in start):
        return  # no epoch was better than the start
    last = _copy_state(run.loaded.model)
    _load_best_head_(run)
    found = run.progress.best
    if wanted != "auto" and found is not None:
        run.progress.best = rank(run, run.progress.floor)
    has_better = False
    for share in SHARES if wanted == "auto" else (wanted,):
        load_plain_(run.loaded.model.sam, blend(start, best, share))
        validate(run)
        is_better = keep_if_best(run, kept_original=share)
        has_better |= is_better
        run.fabric.print(f"with {share:g} of the original weights: {'better' if is_better else 'no better'}")
    if not has_better:
        run.progress.best = found
    run.loaded.model.load_state_dict(last)


def _copy_state(model: FinestSam) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _load_best_head_(run: Run) -> None:
    """Take the class head that belongs to the best weights: the blends of those are judged and saved with it."""
    head = run.loaded.model.class_head
    if head is not None:
        head.load_state_dict(torch.load(head_path(run.folder / "best.pth"), weights_only=True))


def blend(start: dict[str, Tensor], best: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return the weights on the line from `best`, share 0, to `start`, share 1; the rest did not train."""
    return {name: torch.lerp(value, start[name], share) if name in start else value for name, value in best.items()}
