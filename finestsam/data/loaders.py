"""DataLoaders: the number of worker processes never changes the order, the prompts or the result of training."""

import atexit
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from finestsam.data.dataset import SampleDataset, StepSampler, collate
from finestsam.errors import UserError
from finestsam.runtime.processes import use_one_thread
from finestsam.runtime.signals import leave_signals_to_parent

# Iterators that have worker processes. They are kept alive here: as part of a reference cycle, an iterator's queues can
# be destroyed before it, and then it and its processes wait for each other for twenty seconds.
_iterators: set[Any] = set()


@atexit.register
def _end_all() -> None:
    """End all worker processes when Python exits. Python would send SIGTERM, which they ignore, and wait."""
    for iterator in list(_iterators):
        _end(iterator)


def _end(iterator: Any) -> None:
    """End the worker processes of an iterator. After an error in one of them, torch may fail to do so."""
    _iterators.discard(iterator)
    iterator._shutdown_workers()
    for process in iterator._workers:
        if process.is_alive():
            process.kill()


class Loader(DataLoader):
    """A DataLoader that reports when the shared memory is full. torch's own would wait forever.

    Args:
        collate: turns a list of the dataset's items into one item of the loader.
    """

    def __init__(self, dataset: Dataset, collate: Callable[[list], Any], num_workers: int, **arguments: Any):
        super().__init__(
            dataset,
            collate_fn=partial(_hand_over, collate),
            num_workers=num_workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else each start of a loader takes a random number from dropout's generator
            **arguments,
        )

    def check_worker_number_rationality(self) -> None:
        """Do not warn about more processes than cores: the user chooses the number, and too many do no harm."""

    def __iter__(self) -> Iterator[Any]:
        iterator = super().__iter__()
        if self.num_workers > 0 and iterator not in _iterators:
            _iterators.add(iterator)
            if self.persistent_workers:
                weakref.finalize(self, _end, iterator).atexit = False
        keeps_processes = self.num_workers == 0
        try:
            for item in iterator:
                if isinstance(item, UserError):
                    raise item
                yield item
            keeps_processes |= self.persistent_workers
        except GeneratorExit:  # the caller stopped iterating
            keeps_processes |= self.persistent_workers
            raise
        finally:
            if not keeps_processes:
                _end(iterator)


def _hand_over(collate: Callable[[list], Any], samples: list) -> Any:
    """Return the collated samples with their tensors in shared memory; a UserError if the shared memory is full.

    torch would move the tensors in another thread, where an error is lost.
    """
    item = collate(samples)
    if get_worker_info() is None:
        return item
    try:
        for tensor in _list_tensors(item):
            tensor.share_memory_()
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        return UserError(
            "the shared memory (/dev/shm) is too small for the processes that read images: make it larger with "
            "docker's --shm-size, or use no such processes with --num_workers 0"
        )
    return item


def _list_tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for part in item:
            yield from _list_tensors(part)
    elif dataclasses.is_dataclass(item):
        for entry in dataclasses.fields(item):
            yield from _list_tensors(getattr(item, entry.name))


def build_train_loader(dataset: SampleDataset, sampler: StepSampler, num_workers: int) -> DataLoader:
    """Return a loader of (batch, messages) in the sampler's order. Set the sampler's epoch before iterating."""
    use_one_thread()
    return Loader(dataset, collate, num_workers, batch_sampler=sampler, persistent_workers=num_workers > 0)


def build_validation_loader(dataset: SampleDataset, num_workers: int, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return a loader of one rank's share of the images. Batches have one image; prompts are always the same."""
    use_one_thread()
    mine = [[(0, position)] for position in range(rank, len(dataset), world_size)]
    return Loader(dataset, collate, num_workers, batch_sampler=mine)


def end_workers(loader: DataLoader) -> None:
    """End the processes that a loader keeps between epochs. They ignore signals, so Python would wait for them."""
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None and loader.num_workers > 0:
        _end(iterator)


def start_worker(_: int) -> None:
    """Prepare a worker process: it ignores signals and uses one thread."""
    leave_signals_to_parent()
    sys.excepthook = _print_unless_parent_stopped
    torch.set_num_threads(1)
    use_one_thread()


def _print_unless_parent_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error, except the one that a worker gets when its parent process was stopped by a signal."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
