"""The error for a step that does not fit into memory, with its samples and the settings that need less."""

from collections.abc import Iterable

from finestsam.batch import Sample
from finestsam.errors import printable
from finestsam.model.lora import list_lora
from finestsam.tasks.base import Task
from finestsam.training.trainable import trains_encoder


class OutOfMemory(Exception):
    """A step does not fit into the memory of one of the ranks; the text is empty on the others."""


def describe_samples(samples: Iterable[Sample]) -> str:
    """Return `a.png (640 x 480, 12 objects), ...`."""
    return ", ".join(
        f"{printable(sample.file_name)} ({sample.original_size[1]} x {sample.original_size[0]}, "
        f"{len(sample)} {'object' if len(sample) == 1 else 'objects'})"
        for sample in samples
    )


def list_savings(task: Task) -> list[str]:
    """Return the settings with which a step needs less memory, beside decoding fewer objects at a time."""
    config, model, savings = task.config, task.model, []
    if trains_encoder(model):
        if not any(list_lora(model.sam.image_encoder)):
            savings.append("--model_layer.freeze.image_encoder true, alone or with --model_layer.lora.rank 8")
        if not config.model_layer.recompute_encoder:
            savings.append("--model_layer.recompute_encoder")
    if config.batch_size > 1:
        savings.append(f"--batch_size below {config.batch_size}")
    if config.losses.resolution != "low" and task.decodes_masks:
        savings.append("--losses.resolution low")
    return [*savings, "a smaller --model.type"]
