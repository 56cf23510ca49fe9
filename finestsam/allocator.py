"""glibc's memory allocator, set for tensors."""

import ctypes
import sys

# From malloc.h. Every tensor above 128 KB is otherwise a mapping of its own that the system clears page by page when
# it is first written, and takes back when it is freed: a layer that makes and frees 50 MB spends half its time so.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER_TRIM = -1
TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for the next tensor, instead of handing it back to the system.

    For work on the CPU; the process then holds its peak until it ends.

    Returns:
        Whether the C library is one that can be told so.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has no such settings
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER_TRIM, M_TOP_PAD: TOP_PAD_BYTES}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
