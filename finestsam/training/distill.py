"""Teach replaced attention to give the outputs of the original, before fine-tuning begins.

Each block learns by itself: the input and the output of the original attention are its input and target. So one pass
through the original encoder serves all blocks, and no block has to correct the errors of another.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from finestsam.data.dataset import SampleDataset
from finestsam.errors import Defect
from finestsam.model.encoder import attend, pass_mlp
from finestsam.model.load import LoadedModel
from finestsam.model.lora import is_lora
from finestsam.model.sam import FinestSam

LEARNING_RATE = 1e-3
WARMUP_STEPS = 10
# Part of the seed, for the order of the images.
DISTILLATION = 100


def distill_(fabric: Fabric, loaded: LoadedModel, dataset: SampleDataset, steps: int) -> None:
    """Train the new attention to imitate the attention that it replaced, in place, then drop the replaced one.

    Every rank trains alike on the same images.

    Args:
        dataset: of the training images, used without augmentation, one in each step.
    """
    replaced, loaded.replaced = loaded.replaced, {}
    if not replaced or steps == 0 or loaded.path is None:
        return
    model = loaded.model
    teachers = {number: attention.to(model.device) for number, attention in replaced.items()}
    blocks = model.sam.image_encoder.blocks
    named = [pair for number in teachers for pair in blocks[number].attn.named_parameters()]
    weights = [weight.requires_grad_() for name, weight in named if not is_lora(name)]  # LoRA stays zero
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1) * (1 - step / steps)
    )
    is_quiet = fabric.global_rank > 0 or not sys.stderr.isatty()
    history = []
    for image in tqdm(_sample_images(dataset, steps), desc="distillation", total=steps, disable=is_quiet, leave=False):
        optimizer.zero_grad()
        history.append(_add_gradients(model, teachers, image.to(model.device)))
        optimizer.step()
        scheduler.step()
    model.zero_grad()
    if history:
        fabric.print(_describe(list(teachers), history))


def _sample_images(dataset: SampleDataset, count: int) -> Iterator[Tensor]:
    """Yield images, 3 x h x w, uint8, in a new order each round, and print which cannot be read."""
    generator = np.random.default_rng([dataset.settings.seed, DISTILLATION])
    positions: list[int] = []
    for _ in range(count):
        positions = positions or generator.permutation(len(dataset)).tolist()
        try:
            yield dataset.read_pixels(positions.pop(), variant=0)
        except Defect as defect:
            print(f"skipped: {defect.message}", file=sys.stderr)


def _add_gradients(model: FinestSam, teachers: dict[int, torch.nn.Module], image: Tensor) -> list[float]:
    """Send an image through the original encoder, and add to the gradients of each block that learns.

    Returns:
        Each block's mean squared error, as a share of the variance of its target over the image.
    """
    encoder = model.sam.image_encoder
    errors = []
    with (
        torch.autocast(model.device.type, dtype=model.encoder_dtype, enabled=model.encoder_dtype is not None),
        torch.no_grad(),
    ):
        x = encoder.patch_embed(model.sam.preprocess(image.float())[None]) + encoder.pos_embed
        for number, block in enumerate(encoder.blocks):
            given = block.norm1(x)
            target = attend(teachers.get(number, block.attn), given, block.window_size)
            if number in teachers:
                with torch.enable_grad():
                    output = attend(block.attn, given, block.window_size)
                    error = F.mse_loss(output.float(), target.float())
                    error = error / target.float().var(dim=(1, 2)).mean().clamp(min=torch.finfo(torch.float32).tiny)
                    error.backward()
                errors.append(error.item())
            x = pass_mlp(block, x + target)
    return errors


def _describe(blocks: list[int], history: list[list[float]]) -> str:
    """Return the errors of each block over the first and the last steps, a tenth of all."""
    count = max(1, len(history) // 10)
    first, last = (np.mean(part, axis=0) for part in (history[:count], history[-count:]))
    parts = [f"{number}: {one:.2g} to {other:.2g}" for number, one, other in zip(blocks, first, last, strict=True)]
    return (
        f"FFT attention, error as a share of the variance of the original's outputs after {len(history)} steps of "
        f"distillation, by block: {', '.join(parts)}"
    )
