"""Heads on disk: each in a file of its own beside SAM's weights, so that those stay a plain SAM."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from finestsam.errors import UserError
from finestsam.model.weights import load_state_dict

Head = TypeVar("Head", bound=nn.Module)


def head_path(weights: Path, kind: type[nn.Module]) -> Path:
    """Return where a head of this kind lies that belongs to a file of SAM's weights."""
    return weights.with_suffix(kind.SUFFIX)


def load_head(weights: Path, kind: type[Head], build: Callable[[dict[str, Tensor]], Head], purpose: str) -> Head:
    """Return the head beside a file of SAM's weights, in evaluation mode.

    Args:
        kind: its SUFFIX is that of the head's file, in place of that of the weights.
        build: makes a head for a state dict's shapes; a KeyError says that it is of another kind.
        purpose: what `best.json` says that it is for, for the message.

    Raises:
        UserError: there is none, or it is one for something else.
    """
    path, card_path = head_path(weights, kind), weights.with_suffix(".json")
    if not path.is_file():
        raise UserError(f"{path} is missing, the head that {card_path.name} speaks of; copy it here")
    state_dict = load_state_dict(path)
    try:
        head = build(state_dict)
        head.load_state_dict(state_dict)
    except (KeyError, RuntimeError):
        raise UserError(f"{path}: not a head for {purpose} of {card_path}") from None
    return head.eval()
