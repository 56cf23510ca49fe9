"""The memory and time of a step, printed before the first one, and settings that would use the memory better."""

from itertools import accumulate

from torch import nn

from finestsam.model.encoder import ChunkedImageEncoder
from finestsam.training.memory import list_savings
from finestsam.training.probe import GIGABYTE, TRAINING_BYTES, USABLE_SHARE, MemoryNeed
from finestsam.training.step import Stepper
from finestsam.training.trainable import trains_encoder

# Floats that a block of SAM's encoder keeps for its gradient, for each channel of a token: 18 to 23 were counted.
KEPT_FLOATS = 23
# A larger batch is suggested if it is at least so many times as large.
MIN_GROWTH = 2
MOST_IMAGES = 64


def describe_cost(stepper: Stepper, need: MemoryNeed | None, chunk_objects: int, free_bytes: int | None) -> list[str]:
    """Return the lines to print: memory and time of a step, and settings that would use the memory better.

    Args:
        need: of the image that needs most memory; None where it could not be measured.
        chunk_objects: objects decoded at a time.
        free_bytes: None: not known.
    """
    weight_bytes = sum(weight.nbytes for weight in stepper.model.parameters())
    if need is None:
        trained = sum(weight.numel() for weight in stepper.model.parameters() if weight.requires_grad)
        training = _format(TRAINING_BYTES * trained)
        return [f"memory: weights {_format(weight_bytes)}, gradients and optimizer {training}; no step could be tried"]
    decoder_bytes = need.decoder_bytes + min(chunk_objects, len(need.sample)) * need.object_bytes
    total = need.training_bytes + need.encoder_bytes + decoder_bytes
    parts = {"gradients and optimizer": need.training_bytes, "image encoder": need.encoder_bytes}
    parts["decoder and losses" if stepper.task.decodes_masks else "head"] = decoder_bytes
    listed = ", ".join(f"{name} {_format(value)}" for name, value in parts.items() if value)
    free = "" if free_bytes is None else f"; {_format(free_bytes)} are free"
    lines = [
        f"a step on the heaviest image: about {_format(total)} of memory beside {_format(weight_bytes)} of weights "
        f"({listed}), {need.seconds:.2g} s{free}"
    ]
    advice = "" if free_bytes is None else advise(stepper, need, total, free_bytes)
    return [*lines, advice] if advice else lines


def advise(stepper: Stepper, need: MemoryNeed, total: int, free_bytes: int) -> str:
    """Return the settings that would use the free memory better; empty where there are none.

    Args:
        total: bytes that a step takes.
    """
    spare = USABLE_SHARE * free_bytes - total
    if spare < 0:
        settings = list_savings(stepper.task)
        if need.object_bytes and stepper.chunk_objects > 1:
            settings.insert(-1, "a smaller --chunk_objects")
        return f"memory is tight: a step needs less with {', '.join(settings)}"
    if trains_encoder(stepper.model):
        return _advise_more_images(stepper, need, spare)
    return _advise_more_blocks(stepper, spare)


def _advise_more_images(stepper: Stepper, need: MemoryNeed, spare: float) -> str:
    """Return what else fits where the image encoder trains."""
    config, encoder = stepper.config, stepper.model.sam.image_encoder
    if config.model_layer.recompute_encoder:
        kept = _count_kept_bytes(encoder) * len(encoder.blocks) * config.batch_size
        return f"{_format(spare)} to spare: --model_layer.recompute_encoder false is faster" if 0 < kept < spare else ""
    room = int(config.batch_size * (1 + spare / max(need.encoder_bytes, 1)))
    if room < MIN_GROWTH * config.batch_size:
        return ""
    return f"{_format(spare)} to spare: there is room for a --batch_size up to {min(room, MOST_IMAGES)}"


def _advise_more_blocks(stepper: Stepper, spare: float) -> str:
    """Return how much of a frozen image encoder could train."""
    encoder = stepper.model.sam.image_encoder
    kept, depth = _count_kept_bytes(encoder) * stepper.config.batch_size, len(encoder.blocks)
    needs = [kept + TRAINING_BYTES * sum(weight.numel() for weight in block.parameters()) for block in encoder.blocks]
    needs[-1] += TRAINING_BYTES * sum(weight.numel() for weight in encoder.neck.parameters())
    totals = accumulate(reversed(needs))
    count = sum(total < spare for total in totals) if kept else 0
    if count == 0:
        return ""
    which = f"the last {count} of the image encoder's {depth} blocks" if count < depth else "all of the image encoder"
    flag = f"thaw.blocks {count}" if count < depth else "freeze.image_encoder false"
    return f"{_format(spare)} to spare: {which} could train as well, --model_layer.{flag}"


def _count_kept_bytes(encoder: nn.Module) -> int:
    """Return the bytes that a block keeps for its gradient, one image; 0 where that is not known."""
    if not isinstance(encoder, ChunkedImageEncoder):
        return 0
    tokens, channels = encoder.pos_embed.shape[1:3].numel(), encoder.pos_embed.shape[-1]
    return 4 * KEPT_FLOATS * tokens * channels


def _format(count: float) -> str:
    return f"{count / GIGABYTE:.1f} GB" if count >= GIGABYTE else f"{count / 1e6:.0f} MB"
