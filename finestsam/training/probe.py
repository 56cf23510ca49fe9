"""Measure the memory of a step before training starts, and choose how many objects to decode together."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from finestsam.batch import Sample
from finestsam.config import CHUNK_OBJECTS
from finestsam.data.dataset import SampleDataset
from finestsam.errors import Defect, UserError
from finestsam.images.frames import compute_input_size
from finestsam.runtime.memory import is_out_of_memory, reporting_out_of_memory
from finestsam.tasks.losses import count_frame_pixels, measure_piece_bytes
from finestsam.training.memory import describe_samples, list_savings
from finestsam.training.step import Stepper

# More at a time is no faster.
MOST_OBJECTS = {"cpu": CHUNK_OBJECTS, "cuda": 64}
# Share of the free memory to use; the rest is for allocators' waste and for other programs.
USABLE_SHARE = 0.7
# Objects decoded to measure the memory of each; a single one may need less than each of several.
TRIED_OBJECTS = 3
# Bytes for each weight that trains: its gradient and AdamW's two means, float32.
TRAINING_BYTES = 3 * 4
# Time of a forward and backward pass, relative to a forward pass.
BACKWARD = 3
GIGABYTE = 1e9
CGROUP = Path("/sys/fs/cgroup")  # of version 2, the limits of a container


@dataclass(frozen=True)
class MemoryNeed:
    """The memory and time of a step on the image that needs most memory."""

    sample: Sample
    largest: Sample  # the sample with the largest masks, whose loss must fit as well; may be the same one
    training_bytes: int  # gradients and the optimizer's means
    encoder_bytes: int  # what the image encoder keeps for its gradient, all images of a batch
    decoder_bytes: int  # for any number of objects; without masks all that the head keeps
    object_bytes: int  # for each object that is decoded with the others
    seconds: float  # of all of the step, about

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on the number of objects."""
        return self.training_bytes + self.encoder_bytes + self.decoder_bytes


def choose_chunk_objects(stepper: Stepper, need: MemoryNeed | None) -> int:
    """Return how many objects to decode at a time, at most.

    Args:
        need: of `measure_need`.

    Raises:
        UserError: not even one object fits; the message names settings that need less.
    """
    device = stepper.model.device
    most = MOST_OBJECTS.get(device.type, MOST_OBJECTS["cpu"])
    free_bytes = find_free_bytes(device)
    if need is None or free_bytes is None:
        return most
    if need.fixed_bytes + need.object_bytes > free_bytes:
        raise UserError(_explain(stepper, need, free_bytes))
    fitting = (free_bytes * USABLE_SHARE - need.fixed_bytes) / max(need.object_bytes, 1)
    return int(min(max(fitting, 1), most))


def measure_need(stepper: Stepper, dataset: SampleDataset) -> MemoryNeed | None:
    """Encode the image that needs most memory, decode one of its objects, then several, and count autograd's bytes.

    Returns:
        None where no image can be read.

    Raises:
        UserError: not even one object fits; the message names settings that need less.
    """
    resolution = stepper.config.losses.resolution
    largest = sample = _find_first(dataset, lambda index: _count_pixels(dataset, index, resolution))
    if sample is None:
        return None
    if stepper.task.decodes_masks:
        sample = _find_first(dataset, lambda place: _weigh(dataset, place, resolution))
    sample = sample.to(stepper.model.device)
    with reporting_out_of_memory(describe_samples([sample]), ", ".join(list_savings(stepper.task))):
        return _measure(stepper, sample, largest)


def _measure(stepper: Stepper, sample: Sample, largest: Sample) -> MemoryNeed:
    batch_size = stepper.config.batch_size
    known = {weight.untyped_storage().data_ptr() for weight in stepper.model.parameters()}
    encoder_bytes, encoder_seconds, embedding = _try(lambda: stepper.encode([sample]), known)
    if not embedding.requires_grad and stepper.embedder.store:
        encoder_seconds = 0.0  # the embedding is stored
    embedding = embedding.detach().requires_grad_(embedding.requires_grad)
    trained = sum(weight.numel() for weight in stepper.model.parameters() if weight.requires_grad)
    training_bytes, encoder_bytes = TRAINING_BYTES * trained, encoder_bytes * batch_size
    encoder_seconds *= BACKWARD if embedding.requires_grad else 1
    if not stepper.task.decodes_masks:
        head_bytes, seconds, _ = _try(lambda: stepper.task.compute_image_losses(embedding, [sample]), known)
        seconds = batch_size * (encoder_seconds + BACKWARD * seconds)
        return MemoryNeed(sample, sample, training_bytes, encoder_bytes, head_bytes * batch_size, 0, seconds)
    one, seconds, _ = _try(lambda: _decode(stepper, embedding, sample, 1), known)
    object_bytes = one  # an upper limit, unless several objects can be compared
    count = min(len(sample), TRIED_OBJECTS)
    try:
        if count > 1:
            several, seconds_of_all, _ = _try(lambda: _decode(stepper, embedding, sample, count), known)
            object_bytes, seconds = (several - one) // (count - 1), seconds_of_all / count
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    pieces = [measure_piece_bytes(each, stepper.config.losses, stepper.model) for each in (sample, largest)]
    decoder_bytes = one - object_bytes + max(pieces)
    seconds = batch_size * (encoder_seconds + BACKWARD * seconds * len(sample))
    largest = largest if pieces[1] > pieces[0] else sample
    return MemoryNeed(sample, largest, training_bytes, encoder_bytes, decoder_bytes, object_bytes, seconds)


def find_free_bytes(device: torch.device) -> int | None:
    """Return the bytes of memory that are free for this process; None: not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = [_read_meminfo(), _read_container_limit()]
    return min((value for value in found if value is not None), default=None)


def _find_first(dataset: SampleDataset, weigh: Callable[[int], tuple | int]) -> Sample | None:
    """Return the sample with the largest `weigh` among those that can be read."""
    samples = (dataset[(0, index)] for index in sorted(range(len(dataset)), key=weigh, reverse=True))
    return next((sample for sample in samples if not isinstance(sample, Defect)), None)


def _weigh(dataset: SampleDataset, index: int, resolution: str) -> tuple[bool, int]:
    """Return whether an image has several objects, which show the memory of each, and the pixels of all its masks."""
    count, most = len(dataset.records[index].annotations), dataset.settings.max_objects
    return count > 1, _count_pixels(dataset, index, resolution) * min(count, most or count)


def _count_pixels(dataset: SampleDataset, index: int, resolution: str) -> int:
    """Return the pixels of one of an image's masks in the frame of the loss; 0 where the image gives no sample."""
    size, image_size = dataset.records[index].size, dataset.settings.image_size
    try:
        return count_frame_pixels(size, compute_input_size(size, image_size), resolution, image_size)
    except Defect:
        return 0


def _decode(stepper: Stepper, embedding: Tensor, sample: Sample, count: int) -> Tensor:
    prompts = sample.prompts[:count]
    with torch.no_grad():  # the last correction takes most memory: it has a mask prompt and the most clicks
        for _ in range(stepper.config.prompts.correction_clicks):
            prompts = stepper.correct(prompts, stepper.model(embedding, prompts), sample, 0)
    predictions = stepper.model(embedding, prompts)
    return stepper.task.compute_losses(predictions, sample, 0).total


class _Saved:
    """A tensor that autograd has saved; the object lives as long as autograd keeps it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _try(work: Callable[[], Tensor], known: set[int]) -> tuple[int, float, Tensor]:
    """Return the bytes that a computation keeps for its gradient, its seconds and its result.

    Tensors that are freed again during the computation, such as a chunk of the loss, do not count.

    Args:
        known: addresses of storages that do not count, such as the weights'.
    """
    saved: WeakSet[_Saved] = WeakSet()

    def save(tensor: Tensor) -> _Saved:
        entry = _Saved(tensor)
        saved.add(entry)
        return entry

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda entry: entry.tensor):
        result = work()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    seconds = time.perf_counter() - start
    storages = (entry.tensor.untyped_storage() for entry in saved)
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in kept.items() if address not in known), seconds, result


def _explain(stepper: Stepper, need: MemoryNeed, free_bytes: int) -> str:
    needed = (need.fixed_bytes + need.object_bytes) / GIGABYTE
    savings = ", ".join(list_savings(stepper.task))
    samples = [need.sample] if need.largest is need.sample else [need.sample, need.largest]
    return (
        f"{describe_samples(samples)} needs about {needed:.1f} GB of memory even one object at a time, "
        f"{free_bytes / GIGABYTE:.1f} GB are free; less is needed with {savings}"
    )


def _read_meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return values["MemAvailable"] * 1024 if "MemAvailable" in values else None


def _read_container_limit() -> int | None:
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        rows = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # Cached files count as used, but the kernel drops them where memory is needed.
        kept_files = sum(int(value) for name, value in rows if name in ("active_file", "inactive_file"))
        return limit - used + kept_files
    except (OSError, ValueError):  # no such files, or `max`: no limit
        return None
