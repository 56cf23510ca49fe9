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

# Fewer items are done before a process has started.
ITEMS_WORTH_A_PROCESS = 32
ITEMS_PER_TASK = 8
TASKS_AHEAD = 4  # per process: keeps it busy and bounds the memory of the results
MAX_PROCESSES = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(function: Callable[[Item], Result], items: Sequence[Item], title: str) -> Iterator[Result]:
    """Yield `function(item)` in the order of the items, with a progress bar.

    Args:
        function: at the top level of a module, so that other processes can import it.
    """
    count = min(count_cores(), len(items) // ITEMS_WORTH_A_PROCESS, MAX_PROCESSES)
    results = map(function, items) if count < 2 else _map_in_pool(function, items, count)
    yield from tqdm(results, desc=title, total=len(items), disable=not sys.stderr.isatty(), leave=False)


def _map_in_pool(function: Callable[[Item], Result], items: Sequence[Item], count: int) -> Iterator[Result]:
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
                "a process that read the dataset was killed, most likely because memory ran out; "
                "a smaller dataset.images.max_pixels limits the memory"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _do_all(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _start_process() -> None:
    leave_signals_to_parent(but_end_on_sigterm=True)
    use_one_thread()


def count_cores() -> int:
    """Return the number of cores that this process may use. A container can limit it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_one_thread() -> None:
    """Limit OpenCV to one thread in this process and in processes that it starts from now on.

    Call this before forking. A forked child inherits OpenCV's thread pool without its threads and waits for them
    forever, even inside `setNumThreads`.
    """
    cv2.setNumThreads(1)
