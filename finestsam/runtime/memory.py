"""Recognise errors that mean out of memory, and report them with advice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finestsam.errors import UserError

# Parts of the messages of the CPU's allocator, and of cuBLAS and cuDNN, which raise a plain RuntimeError.
MESSAGE_PARTS = ("can't allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in MESSAGE_PARTS)


@contextmanager
def reporting_out_of_memory(subject: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError that names what did not fit and the settings that need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{subject}: out of memory; try {advice}") from None
