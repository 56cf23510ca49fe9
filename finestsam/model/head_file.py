"""Heads on disk: each in a file of its own beside SAM's weights, so that those stay a plain SAM."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from finestsam.errors import VALUE_ERRORS, UserError
from finestsam.model.weights import load_state_dict

Head = TypeVar("Head", bound=nn.Module)


def head_path(weights: Path, kind: type[nn.Module]) -> Path:
    """Return where a head of this kind lies that belongs to a file of SAM's weights."""
    return weights.with_suffix(kind.SUFFIX)


def load_head(
    weights: Path, kind: type[Head], build: Callable[[dict[str, Tensor]], Head], purpose: str, width: int
) -> Head:
    """Return the head beside a file of SAM's weights, in evaluation mode.

    Args:
        kind: its SUFFIX is that of the head's file, in place of that of the weights.
        build: makes a head for a state dict's shapes; a KeyError says that it is of another kind.
        purpose: what `best.json` says that it is for, for the message.
        width: channels of the model's embeddings.

    Raises:
        UserError: there is none, or it is one for something else.
    """
    path, card_path = head_path(weights, kind), weights.with_suffix(".json")
    if not path.is_file():
        raise UserError(f"{path} is missing, the head that {card_path.name} speaks of; copy it here")
    state_dict = load_state_dict(path)
    try:
        with torch.device("meta"):  # no memory is taken for what the shapes promise and the file does not hold
            build(state_dict).load_state_dict(state_dict, assign=True)
        head = build(state_dict)
        head.load_state_dict(state_dict)
    except (RuntimeError, MemoryError, *VALUE_ERRORS):
        raise UserError(f"{path}: not a head for {purpose} of {card_path}") from None
    if head.width != width:
        raise UserError(f"{path}: a head for embeddings of {head.width} channels, those of {weights.name} have {width}")
    return head.eval()
