"""What the optimizer updates, and how its learning rate goes."""

import bisect
import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from finestsam.config import LambdaLRConfig, OptConfig, SchedConfig

# The image encoder's embeddings of places, which are bare parameters of its modules.
POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")

NamedParameters = list[tuple[str, nn.Parameter]]


def build_optimizer(model: nn.Module, opt: OptConfig, fused: bool = False) -> torch.optim.AdamW:
    """Return AdamW on what trains: one group with weight decay, one without."""
    decayed, spared = split_parameters(model)
    groups = [
        {"params": [parameter for _, parameter in decayed], "weight_decay": opt.weight_decay},
        {"params": [parameter for _, parameter in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=opt.learning_rate, fused=fused)


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
        (spared if is_spared else decayed).append((name, parameter))
    return decayed, spared


def build_scheduler(optimizer: torch.optim.Optimizer, sched: SchedConfig, eval_interval: int) -> LRScheduler:
    """Return the learning rate's schedule.

    LambdaLR is stepped after every optimizer step, ReduceLROnPlateau with the metric after every validation.

    Args:
        eval_interval: epochs between validations; 0: none in between.
    """
    if sched.type == "LambdaLR":
        return LambdaLR(optimizer, lambda step: lr_factor(step, sched.LambdaLR))
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


def lr_factor(step: int, schedule: LambdaLRConfig) -> float:
    """Return what the learning rate is multiplied by, in (0, 1].

    Args:
        step: optimizer steps already taken; the first one trains with the factor of step 0.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    return schedule.decay_factor ** -bisect.bisect_right(schedule.steps, step)
