"""Work on many items in several processes, in order, with progress and bounded memory."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2
from tqdm import tqdm

from finestsam.errors import UserError
from finestsam.runtime.signals import leave_signals_to_parent

# Fewer than these are done before processes have started.
ITEMS_WORTH_A_PROCESS = 32
ITEMS_PER_TASK = 8
TASKS_AHEAD = 4  # per process: enough to keep it busy, few enough to keep the results small
MAX_PROCESSES = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(function: Callable[[Item], Result], items: Sequence[Item], title: str) -> Iterator[Result]:
    """Yield `function(item)` in the order of the items, with a progress bar.

    Args:
        function: of the top level of a module, so that another process can find it.
    """
    count = min(count_cores(), len(items) // ITEMS_WORTH_A_PROCESS, MAX_PROCESSES)
    results = map(function, items) if count < 2 else _map_beside(function, items, count)
    yield from tqdm(results, desc=title, total=len(items), disable=not sys.stderr.isatty(), leave=False)


def _map_beside(function: Callable[[Item], Result], items: Sequence[Item], count: int) -> Iterator[Result]:
    use_one_thread()
    with ProcessPoolExecutor(count, initializer=_start_process) as pool:
        pending: deque = deque()
        try:
            for start in range(0, len(items), ITEMS_PER_TASK):
                pending.append(pool.submit(_do_all, function, items[start : start + ITEMS_PER_TASK]))
                if len(pending) > count * TASKS_AHEAD:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a process that read the dataset was ended from outside, most likely for want of memory; "
                "a smaller dataset.images.max_pixels bounds it"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _do_all(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _start_process() -> None:
    leave_signals_to_parent(but_end_on_sigterm=True)
    use_one_thread()


def count_cores() -> int:
    """Return the cores that this process may use, which a container can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_one_thread() -> None:
    """Keep OpenCV to one thread in this process and those that it starts from now on.

    Called before processes are forked: a child that inherits a pool whose threads stayed with its parent waits for
    them for ever, even in `setNumThreads` itself.
    """
    cv2.setNumThreads(1)
