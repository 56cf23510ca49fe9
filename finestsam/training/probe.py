"""What a step takes, tried before training starts, and how many objects are decoded together: as many as fit."""

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
from finestsam.training.losses import count_frame_pixels, measure_piece_bytes
from finestsam.training.memory import describe_samples, list_savings
from finestsam.training.step import Stepper
from finestsam.training.trainable import decodes_masks

# More at a time is no faster.
MOST_OBJECTS = {"cpu": CHUNK_OBJECTS, "cuda": 64}
# Of the free memory: the rest is for what allocators waste, and for what runs beside.
USABLE_SHARE = 0.7
# Decoded to tell what each one needs: a first one shares what several cannot.
TRIED_OBJECTS = 3
# For a weight that trains: its gradient and AdamW's two means, float32.
TRAINING_BYTES = 3 * 4
# Times that a pass forward takes, forward and backward.
BACKWARD = 3
GIGABYTE = 1e9
CGROUP = Path("/sys/fs/cgroup")  # of version 2, the limits of a container


@dataclass(frozen=True)
class MemoryNeed:
    """What a step on the heaviest image keeps at the same time."""

    sample: Sample
    largest: Sample  # that, or one whose masks are larger, for whose loss there has to be room as well
    training_bytes: int  # gradients and the optimizer's means
    encoder_bytes: int  # what the image encoder keeps for its gradient, all images of a batch
    decoder_bytes: int  # for any number of objects; in the semantic task all that the head keeps
    object_bytes: int  # for each object that is decoded with the others
    seconds: float  # of all of the step, about

    @property
    def fixed_bytes(self) -> int:
        """For any number of objects."""
        return self.training_bytes + self.encoder_bytes + self.decoder_bytes


def choose_chunk_objects(stepper: Stepper, need: MemoryNeed | None) -> int:
    """Return how many objects to decode at a time, at most.

    Args:
        need: of `measure_need`.

    Raises:
        UserError: not even one fits; with the settings that need less.
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
    """Encode the heaviest image, decode one of its objects and then several, and count what autograd keeps.

    Returns:
        None where no image can be read.

    Raises:
        UserError: not even one object of it fits; with the settings that need less.
    """
    resolution = stepper.config.losses.resolution
    largest = sample = _find_first(dataset, lambda place: _count_pixels(dataset, place, resolution))
    if sample is None:
        return None
    if decodes_masks(stepper.model, stepper.config):
        sample = _find_first(dataset, lambda place: _weigh(dataset, place, resolution))
    sample = sample.to(stepper.model.device)
    with reporting_out_of_memory(describe_samples([sample]), ", ".join(list_savings(stepper.config, stepper.model))):
        return _measure(stepper, sample, largest)


def _measure(stepper: Stepper, sample: Sample, largest: Sample) -> MemoryNeed:
    batch_size = stepper.config.batch_size
    known = {weight.untyped_storage().data_ptr() for weight in stepper.model.parameters()}
    encoder_bytes, encoder_seconds, embedding = _try(lambda: stepper.encode([sample]), known)
    if not embedding.requires_grad and stepper.embedder.store:
        encoder_seconds = 0.0  # it is there
    embedding = embedding.detach().requires_grad_(embedding.requires_grad)
    trained = sum(weight.numel() for weight in stepper.model.parameters() if weight.requires_grad)
    training_bytes, encoder_bytes = TRAINING_BYTES * trained, encoder_bytes * batch_size
    encoder_seconds *= BACKWARD if embedding.requires_grad else 1
    if not decodes_masks(stepper.model, stepper.config):
        head_bytes, seconds, _ = _try(lambda: stepper.compute_image_losses(embedding, [sample]), known)
        seconds = batch_size * (encoder_seconds + BACKWARD * seconds)
        return MemoryNeed(sample, sample, training_bytes, encoder_bytes, head_bytes * batch_size, 0, seconds)
    one, seconds, _ = _try(lambda: _decode(stepper, embedding, sample, 1), known)
    object_bytes = one  # all of it, unless several tell
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
    """Return how much memory is left for this process; None: the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = [_read_meminfo(), _read_container_limit()]
    return min((value for value in found if value is not None), default=None)


def _find_first(dataset: SampleDataset, weigh: Callable[[int], tuple | int]) -> Sample | None:
    """Return the sample of the largest weight among those that can be read."""
    samples = (dataset[(0, place)] for place in sorted(range(len(dataset)), key=weigh, reverse=True))
    return next((sample for sample in samples if not isinstance(sample, Defect)), None)


def _weigh(dataset: SampleDataset, place: int, resolution: str) -> tuple[bool, int]:
    """Return the pixels of all masks of an image, after whether it has several, which tell what each one needs."""
    count, most = len(dataset.records[place].annotations), dataset.settings.max_objects
    return count > 1, _count_pixels(dataset, place, resolution) * min(count, most or count)


def _count_pixels(dataset: SampleDataset, place: int, resolution: str) -> int:
    """Return the pixels of one of an image's masks in the frame of the loss, 0 where it is no sample."""
    size, image_size = dataset.records[place].size, dataset.settings.image_size
    try:
        return count_frame_pixels(size, compute_input_size(size, image_size), resolution, image_size)
    except Defect:
        return 0


def _decode(stepper: Stepper, embedding: Tensor, sample: Sample, count: int) -> Tensor:
    prompts = sample.prompts[:count]
    with torch.no_grad():  # the last correction takes the most memory: it brings a mask along, and the most clicks
        for _ in range(stepper.config.prompts.correction_clicks):
            prompts = stepper.correct(prompts, stepper.model(embedding, prompts), sample, 0)
    predictions = stepper.model(embedding, prompts)
    return stepper.take_losses(predictions, sample, 0).total


class _Saved:
    """A tensor that autograd saves, as long as it does."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _try(work: Callable[[], Tensor], known: set[int]) -> tuple[int, float, Tensor]:
    """Return the bytes that a computation keeps for its gradient beside what is known, its seconds and its result.

    What is saved and freed again on the way, as a piece of the loss is, does not count.
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
    return sum(size for place, size in kept.items() if place not in known), seconds, result


def _explain(stepper: Stepper, need: MemoryNeed, free_bytes: int) -> str:
    needed = (need.fixed_bytes + need.object_bytes) / GIGABYTE
    savings = ", ".join(list_savings(stepper.config, stepper.model))
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
        # Files that the kernel keeps in memory count as used, and are given up where memory is needed.
        kept_files = sum(int(value) for name, value in rows if name in ("active_file", "inactive_file"))
        return limit - used + kept_files
    except (OSError, ValueError):  # no such files, or `max`: no limit
        return None
