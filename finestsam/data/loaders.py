"""DataLoaders whose order, prompts and number of processes never change what is learnt."""

import torch
from torch.utils.data import DataLoader

from finestsam.data.dataset import SampleDataset, StepSampler, collate
from finestsam.images import use_one_thread
from finestsam.interruption import leave_signals_to_parent


def build_train_loader(dataset: SampleDataset, sampler: StepSampler, num_workers: int) -> DataLoader:
    """Return the loader of (batch, messages) in the sampler's order; set the sampler's epoch before iterating."""
    use_one_thread()
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=start_worker,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each start of a loader draws a number that dropout would have drawn
    )


def build_validation_loader(dataset: SampleDataset, num_workers: int, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return the loader of one rank's share of the pictures: one at a time, none twice, always the same prompts."""
    use_one_thread()
    mine = [[(0, position)] for position in range(rank, len(dataset), world_size)]
    return DataLoader(
        dataset,
        batch_sampler=mine,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )


def end_workers(loader: DataLoader) -> None:
    """End the processes that a loader keeps between epochs; they answer no signal, and Python would wait for them."""
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None and loader.num_workers > 0:
        iterator._shutdown_workers()


def start_worker(_: int) -> None:
    """Make a loader's process a quiet one."""
    leave_signals_to_parent()
    torch.set_num_threads(1)
    use_one_thread()
