"""Settings of the processor and the memory allocator. Each mode applies them once, for the whole process."""

import ctypes
import sys
from functools import cache

import torch

# From malloc.h. By default, every tensor above 128 KB is a memory mapping of its own. The system clears its pages at
# the first write and takes them back when the tensor is freed: half the time of a layer that allocates 50 MB.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER_TRIM = -1
TOP_PAD_BYTES = 64 << 20

FENV_BYTES = 64  # at least the size of fenv_t (fenv.h): 32 on x86-64, 8 on ARM


def set_processor() -> None:
    """Keep freed memory, and flush denormals to zero."""
    keep_freed_memory()
    flush_denormals()


def keep_freed_memory() -> bool:
    """Let this process reuse freed memory for the next tensor, instead of returning it to the system.

    This speeds up work on the CPU. The process then holds its peak memory until it ends.

    Returns:
        Whether the C library supports it.
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
    """Replace float32 numbers below 1.2e-38 by zero, in this thread, in torch's thread pool and in later threads.

    The attention weights of a trained model contain many such numbers, and their gradients even more. Intel processors
    need many times longer for each of them than for other numbers.

    Returns:
        Whether the processor supports it.
    """
    if not torch.set_flush_denormal(True):
        return False
    if sys.platform.startswith("linux"):
        _share_floating_point_state()
    return True


def _share_floating_point_state() -> None:
    """Copy this thread's floating-point state to the existing threads of torch's pool; new threads inherit it."""
    process = ctypes.CDLL(None)
    try:
        run_in_pool, read, write = process.GOMP_parallel, process.fegetenv, process.fesetenv
    except AttributeError:  # not GNU's OpenMP
        return
    state = ctypes.create_string_buffer(FENV_BYTES)
    if read(state) == 0:
        run_in_pool(write, state, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))


@cache
def has_feature(name: str) -> bool:
    """Return whether the processor has a feature, by torch's name: `avx512_bf16`, `amx_bf16`."""
    list_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # missing in some versions of torch
    return bool(list_capabilities().get(name))
