"""How many objects go through the decoder together: as many as the memory found takes, told before training starts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finestsam.batch import Sample
from finestsam.config import CHUNK_OBJECTS
from finestsam.data.dataset import SampleDataset
from finestsam.errors import Defect, UserError
from finestsam.training.losses import measure_piece_bytes
from finestsam.training.memory import describe_samples, list_savings
from finestsam.training.step import Stepper

# More at a time is no faster.
MOST_OBJECTS = {"cpu": CHUNK_OBJECTS, "cuda": 64}
# Of the free memory: the rest is for what allocators waste, and for what runs beside.
USABLE_SHARE = 0.7
GIGABYTE = 1e9


@dataclass(frozen=True)
class MemoryNeed:
    """What a step on the heaviest picture keeps at the same time."""

    sample: Sample
    fixed_bytes: int  # for any number of objects: the encoder's graph, gradients, the optimizer, a piece of the loss
    object_bytes: int  # for each object that is decoded with the others


def choose_chunk_objects(stepper: Stepper, dataset: SampleDataset) -> int:
    """Return how many objects to decode at a time, at most.

    Raises:
        UserError: not even one fits; with the settings that need less.
    """
    device = stepper.model.device
    most = MOST_OBJECTS.get(device.type, MOST_OBJECTS["cpu"])
    free_bytes = find_free_bytes(device)
    need = measure_need(stepper, dataset)
    if need is None or free_bytes is None:
        return most
    if need.fixed_bytes + need.object_bytes > free_bytes:
        raise UserError(_explain(stepper, need, free_bytes))
    fitting = (free_bytes * USABLE_SHARE - need.fixed_bytes) / max(need.object_bytes, 1)
    return int(min(max(fitting, 1), most))


def measure_need(stepper: Stepper, dataset: SampleDataset) -> MemoryNeed | None:
    """Decode one object and then two of the heaviest picture, and count what autograd keeps.

    Returns:
        None where no picture has two.
    """
    sample = _find_heaviest(dataset)
    if sample is None or len(sample) < 2:
        return None
    sample = sample.to(stepper.model.device)
    known = {weight.untyped_storage().data_ptr() for weight in stepper.model.parameters()}
    encoder_bytes, embedding = _count_kept_bytes(lambda: stepper.encode([sample]), known)
    embedding = embedding.detach().requires_grad_(embedding.requires_grad)
    one, two = (_count_kept_bytes(lambda n=n: _decode(stepper, embedding, sample, n), known)[0] for n in (1, 2))
    trained = sum(weight.numel() for weight in stepper.model.parameters() if weight.requires_grad)
    fixed = encoder_bytes * stepper.config.batch_size + one - (two - one)
    fixed += 3 * 4 * trained  # a gradient and AdamW's two means, float32
    fixed += measure_piece_bytes(sample, stepper.config.losses, stepper.model)
    return MemoryNeed(sample, fixed, two - one)


def find_free_bytes(device: torch.device) -> int | None:
    """Return how much memory is left for this process; None: the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = [_read_meminfo(), _read_container_limit()]
    return min((value for value in found if value is not None), default=None)


def _find_heaviest(dataset: SampleDataset) -> Sample | None:
    """Return the sample with the most objects, of those the one with the most pixels."""
    records = dataset.records
    order = sorted(
        range(len(records)), key=lambda place: (len(records[place].annotations), records[place].size), reverse=True
    )
    samples = (dataset[(0, place)] for place in order)
    return next((sample for sample in samples if not isinstance(sample, Defect)), None)


def _decode(stepper: Stepper, embedding: Tensor, sample: Sample, count: int) -> Tensor:
    prompts = sample.prompts[:count]
    with torch.no_grad():  # the last correction is the heaviest answer: it brings a mask along, and the most clicks
        for _ in range(stepper.config.prompts.correction_clicks):
            prompts = stepper.correct(prompts, stepper.model(embedding, prompts), sample, 0)
    predictions = stepper.model(embedding, prompts)
    return stepper.take_losses(predictions, sample, 0).total


def _count_kept_bytes(work: Callable[[], Tensor], known: set[int]) -> tuple[int, Tensor]:
    """Return the bytes of what a computation keeps for its gradient beside what is known, and its result."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = work()
    return sum(kept.values()), result


def _explain(stepper: Stepper, need: MemoryNeed, free_bytes: int) -> str:
    needed = (need.fixed_bytes + need.object_bytes) / GIGABYTE
    return (
        f"{describe_samples([need.sample])} needs about {needed:.1f} GB of memory even one object at a time, "
        f"{free_bytes / GIGABYTE:.1f} GB are free; less is needed with {list_savings(stepper.config, stepper.model)}"
    )


def _read_meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return values["MemAvailable"] * 1024 if "MemAvailable" in values else None


def _read_container_limit() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no such files, or `max`: no limit
        return None
