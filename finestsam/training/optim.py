"""The optimizer's parameter groups, and the schedule of the learning rate."""

import bisect
import math
from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from finestsam.config import LambdaLRConfig, OptConfig, SchedConfig

# The image encoder's position embeddings, which are bare parameters of its modules.
POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")
# One row for each of the decoder's masks; training uses one or three of them, and decay would shrink the others.
SCORES = "mask_decoder.iou_prediction_head.layers.2.weight"

ENCODER = "sam.image_encoder."
HEADS = ("semantic_head.", "class_head.")  # of tasks, which start from random weights

# Largest share of the warm-up in the steps of all epochs: a short run shall reach its learning rate too.
WARMUP_SHARE = 0.1

NamedParameters = list[tuple[str, nn.Parameter]]


def build_optimizer(model: nn.Module, opt: OptConfig, fused: bool = False) -> torch.optim.AdamW:
    """Return AdamW on the weights that train: for each learning rate one group with weight decay and one without.

    The learning rate of a group is `opt.learning_rate` times its `share`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight_decay, parameters in zip((opt.weight_decay, 0.0), split_parameters(model), strict=True):
        for name, parameter in parameters:
            share = _find_share(name, opt)
            groups.setdefault((share, weight_decay), []).append(parameter)
    listed = [
        {"params": parameters, "weight_decay": weight_decay, "lr": share * opt.learning_rate, "share": share}
        for (share, weight_decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(listed, lr=opt.learning_rate, fused=fused)


def learning_rate_of(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate before it is multiplied by the groups' shares."""
    group = optimizer.param_groups[0]
    return group["lr"] / group["share"]


def _find_share(name: str, opt: OptConfig) -> float:
    """Return the share of the learning rate of a weight."""
    if name.startswith(HEADS):
        return opt.head_learning_rate / opt.learning_rate
    return opt.rates.image_encoder if name.startswith(ENCODER) else 1.0


def split_parameters(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """Return the trainable parameters with their names: those to decay, and those to leave alone.

    Decay pulls towards zero. That suits the weights of linear layers and convolutions, whose outputs are sums; a norm's
    scale, a bias, a token or a position has no reason to be small.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_spared = parameter.ndim < 2 or id(parameter) in embeddings or name.rpartition(".")[2] in POSITIONS
        is_spared |= name.endswith(SCORES)
        (spared if is_spared else decayed).append((name, parameter))
    return decayed, spared


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    sched: SchedConfig,
    eval_interval: int,
    total_steps: int,
    epoch_steps: int | None = None,
) -> LRScheduler:
    """Return the learning rate's schedule.

    LambdaLR is stepped after every optimizer step, ReduceLROnPlateau with the metric after every validation.

    Args:
        eval_interval: epochs between validations; 0: none in between.
        total_steps: optimizer steps of the whole run; decay steps below 1 are shares of it.
        epoch_steps: optimizer steps of all epochs, wherever max_steps ends the run; they limit the warm-up.
            None: `total_steps`.
    """
    if sched.type == "LambdaLR":
        schedule = replace(
            sched.LambdaLR,
            steps=[_count_steps(step, total_steps) for step in sched.LambdaLR.steps],
            warmup_steps=limit_warmup(sched.LambdaLR, total_steps if epoch_steps is None else epoch_steps),
        )
        return LambdaLR(optimizer, lambda step: lr_factor(step, schedule))
    plateau = sched.ReduceLROnPlateau
    return ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=plateau.decay_factor,
        patience=math.ceil(plateau.epoch_patience / max(eval_interval, 1)),  # torch counts validations
        threshold=plateau.threshold,
        cooldown=plateau.cooldown,
        min_lr=plateau.min_lr,
    )


def limit_warmup(schedule: LambdaLRConfig, epoch_steps: int) -> int:
    """Return the steps of the warm-up.

    They are at most `WARMUP_SHARE` of the steps of all epochs where the decay is in shares as well. Where it is in
    steps the schedule does not depend on the length of the run, so that a run may be continued beyond its end.
    """
    is_in_shares = any(step < 1 for step in schedule.steps)
    return min(schedule.warmup_steps, round(WARMUP_SHARE * epoch_steps)) if is_in_shares else schedule.warmup_steps


def _count_steps(step: float, total_steps: int) -> int:
    return round(step * total_steps) if step < 1 else int(step)


def lr_factor(step: int, schedule: LambdaLRConfig) -> float:
    """Return the factor of the learning rate, in (0, 1].

    Args:
        step: optimizer steps already taken; the first one trains with the factor of step 0.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    return schedule.decay_factor ** -bisect.bisect_right(schedule.steps, step)
