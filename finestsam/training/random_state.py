"""Save and restore where every global random generator of a process stands."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of every global generator of this process, in types that torch.load accepts as plain data."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy_state}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()  # of this process's device: asking the others would occupy them
    return state


def check_random_state(state: dict[str, Any]) -> None:
    """Raise an error of Python's or torch's unless every generator can be continued from there."""
    torch.Generator().set_state(state["torch"])
    random.Random().setstate(state["python"])
    np.random.RandomState().set_state(state["numpy"])


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue every global generator where `random_state` found it."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
