"""DataLoaders whose order, prompts and number of processes never change what is learnt."""

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

# Those that have processes. They are kept, for what goes in a circle of references is destroyed in any order: a pass
# would find its queues closed, its processes wait for a word from there, and it for them, twenty seconds long.
_passes: set[Any] = set()


@atexit.register
def _end_all() -> None:
    """End what is left when Python exits, which would ask with SIGTERM, that these processes ignore, and wait."""
    for iterator in list(_passes):
        _end(iterator)


def _end(iterator: Any) -> None:
    """End the processes of a pass; after an error in one of them torch may fail to."""
    _passes.discard(iterator)
    iterator._shutdown_workers()
    for process in iterator._workers:
        if process.is_alive():
            process.kill()


class Loader(DataLoader):
    """A DataLoader whose processes say when the shared memory is full; torch's own would wait for them for ever.

    Args:
        collate: a list of the dataset's items to one item of the loader.
    """

    def __init__(self, dataset: Dataset, collate: Callable[[list], Any], num_workers: int, **arguments: Any):
        super().__init__(
            dataset,
            collate_fn=partial(_hand_over, collate),
            num_workers=num_workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else each start of a loader draws a number that dropout would have drawn
            **arguments,
        )

    def check_worker_number_rationality(self) -> None:
        """Say nothing of more processes than cores: their number is the user's, and too many do no harm."""

    def __iter__(self) -> Iterator[Any]:
        iterator = super().__iter__()
        if self.num_workers > 0 and iterator not in _passes:
            _passes.add(iterator)
            if self.persistent_workers:
                weakref.finalize(self, _end, iterator).atexit = False
        keeps_processes = self.num_workers == 0
        try:
            for item in iterator:
                if isinstance(item, UserError):
                    raise item
                yield item
            keeps_processes |= self.persistent_workers
        except GeneratorExit:  # nobody wants more of this pass
            keeps_processes |= self.persistent_workers
            raise
        finally:
            if not keeps_processes:
                _end(iterator)


def _hand_over(collate: Callable[[list], Any], samples: list) -> Any:
    """Return what `collate` makes of the samples, its tensors in shared memory; a UserError where that is full.

    torch would move them there on another thread, where an error stops nothing and reaches nobody.
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
            "the shared memory (/dev/shm) is too small for the processes that read images ahead: docker's --shm-size "
            "makes it larger, --num_workers 0 reads without them"
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
    """Return the loader of (batch, messages) in the sampler's order; set the sampler's epoch before iterating."""
    use_one_thread()
    return Loader(dataset, collate, num_workers, batch_sampler=sampler, persistent_workers=num_workers > 0)


def build_validation_loader(dataset: SampleDataset, num_workers: int, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return the loader of one rank's share of the images: one at a time, none twice, always the same prompts."""
    use_one_thread()
    mine = [[(0, position)] for position in range(rank, len(dataset), world_size)]
    return Loader(dataset, collate, num_workers, batch_sampler=mine)


def end_workers(loader: DataLoader) -> None:
    """End the processes that a loader keeps between epochs; they ignore signals, and Python would wait for them."""
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None and loader.num_workers > 0:
        _end(iterator)


def start_worker(_: int) -> None:
    """Make a loader's process a quiet one."""
    leave_signals_to_parent()
    sys.excepthook = _print_unless_left
    torch.set_num_threads(1)
    use_one_thread()


def _print_unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what goes wrong on the thread that hands tensors over, but that a signal let nobody take them."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
