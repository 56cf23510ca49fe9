"""How this process uses the processor and its memory: set once by each mode, for as long as the process lives."""

import ctypes
import sys
from functools import cache

import torch

from finestsam.config import Config

# From malloc.h. Every tensor above 128 KB is otherwise a mapping of its own that the system clears page by page when
# it is first written, and takes back when it is freed: a layer that makes and frees 50 MB spends half its time so.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER_TRIM = -1
TOP_PAD_BYTES = 64 << 20

FENV_BYTES = 64  # at least what fenv.h's fenv_t takes anywhere: 32 on x86-64, 8 on ARM


def set_processor(config: Config) -> None:
    """Do what the settings `keep_memory` and `flush_denormals` say."""
    if config.keep_memory:
        keep_freed_memory()
    if config.flush_denormals:
        flush_denormals()


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for the next tensor, instead of handing it back to the system.

    For work on the CPU; the process then holds its peak until it ends.

    Returns:
        Whether the C library has that setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has no such settings
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER_TRIM, M_TOP_PAD: TOP_PAD_BYTES}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


def flush_denormals() -> bool:
    """Let float32 numbers below 1.2e-38 be zero, in this thread, in torch's pool, and in threads made from now on.

    What a trained attention takes of its tokens, and still more the gradients of that, hold many such numbers, and
    Intel's processors take many times as long for each as for any other.

    Returns:
        Whether the processor can.
    """
    if not torch.set_flush_denormal(True):
        return False
    if sys.platform.startswith("linux"):
        _share_floating_point_state()
    return True


def _share_floating_point_state() -> None:
    """Give the threads that torch's pool has already this thread's state; new ones inherit it."""
    process = ctypes.CDLL(None)
    try:
        run_in_pool, read, write = process.GOMP_parallel, process.fegetenv, process.fesetenv
    except AttributeError:  # another OpenMP than GNU's
        return
    state = ctypes.create_string_buffer(FENV_BYTES)
    if read(state) == 0:
        run_in_pool(write, state, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))


@cache
def has_feature(name: str) -> bool:
    """Return whether the processor has what torch's list calls so: `avx512_bf16`, `amx_bf16`."""
    list_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # not in every torch
    return bool(list_capabilities().get(name))
