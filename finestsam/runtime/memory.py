"""Memory that does not suffice: how an error says so, and what is said then."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finestsam.errors import UserError

# The CPU's allocator has no error of its own; cuBLAS and cuDNN have others than torch.
SIGNS = ("can't allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in SIGNS)


@contextmanager
def naming_what_needs_less(what: str, advice: str) -> Iterator[None]:
    """Turn an error of memory into a UserError that says what did not fit, and what needs less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what}: the memory is too small; less is needed with {advice}") from None
