"""Compare encoder and generator on a GPU: segment_anything in float32, finestsam in bfloat16 and compiled.

    python -m benchmarks.gpu                 vit_b and vit_h
    python -m benchmarks.gpu --device cpu --types vit_tiny --batch 1    without a GPU, only to test this script

Weights are random and the objects synthetic (synthetic.py). `flex` replaces the encoder's attention by compiled
FlexAttention with the relative positions as a score modification. The arithmetic limit is the measured speed of one
large bfloat16 matrix product.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.generator import compare_masks, list_points
from benchmarks.measure import describe_machine, print_table
from benchmarks.synthetic import FoldedWithObjects, StockWithObjects, SyntheticObjects, stir_
from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig
from finestsam.data.synthetic import render_scene
from finestsam.model import attention
from finestsam.model.architectures import ARCHITECTURES, build_sam
from finestsam.model.sam import FinestSam
from finestsam.prediction.generator import generate_masks

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["vit_b", "vit_h"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    device = torch.device(given.device)
    print(describe_machine())
    peak = _measure_peak(device)
    print(f"bfloat16 product: {peak / 1e12:.1f} TFLOP/s")
    for model_type in given.types:
        _compare_encoders(model_type, device, given.batch, peak)
        _compare_generators(model_type, device)


@torch.no_grad()
def _compare_encoders(model_type: str, device: torch.device, batch: int, peak: float) -> None:
    torch.manual_seed(0)
    ours = build_sam(model_type).image_encoder.to(device)
    stir_(ours)
    stock = copy.deepcopy(ours)
    stock.__class__ = ImageEncoderViT
    compiled, flexible = copy.deepcopy(ours), copy.deepcopy(ours)
    compiled.compile()
    flexible.compile()
    images = torch.randn(batch, 3, ours.img_size, ours.img_size, device=device)
    exact = stock(images[:1])
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "segment_anything, float32": stock,
        "segment_anything, bfloat16": _in_half(stock, device),
        "finestsam, float32": ours,
        "finestsam, bfloat16": _in_half(ours, device),
        "finestsam, bfloat16, compiled": _in_half(compiled, device),
        "finestsam, bfloat16, flex, compiled": _with_flex(_in_half(flexible, device)),
    }
    flops = _count_flops(model_type, ours.img_size)
    rows, reference = [], None
    for name, encode in variants.items():
        try:
            error = (encode(images[:1]).float() - exact).norm() / exact.norm()
            seconds, megabytes = _measure(lambda encode=encode: encode(images), device)
        except Exception as failure:  # a variant that this machine does not support is a row without figures
            rows.append([name, "-", "-", "-", "-", type(failure).__name__])
            continue
        reference = reference or seconds
        share = flops * batch / seconds / peak
        rows.append(
            [name, f"{batch / seconds:.2f}", f"{reference / seconds:.1f} x", f"{megabytes:.0f}", f"{share:.0%}",
             f"{error:.1e}"]
        )  # fmt: skip
    print(f"\n{model_type}, encoder, {batch} images of {ours.img_size} pixels")
    print_table(["encoder", "images / s", "ratio", "peak MB", "of the limit", "relative error"], rows)


def _compare_generators(model_type: str, device: torch.device) -> None:
    torch.manual_seed(0)
    stock = build_sam(model_type)
    stir_(stock.image_encoder)
    settings = GeneratorConfig(**GENERATOR_DEFAULTS)
    image = render_scene(0, 0, (1200, 1800)).image
    size = stock.image_encoder.img_size
    stock.to(device)
    points = list_points(image.shape[:2], settings, size)
    objects = SyntheticObjects(stock.prompt_encoder, points, size // 4, fills=False, device=device)
    ours = copy.deepcopy(stock)
    stock.image_encoder.__class__, stock.mask_decoder.__class__ = ImageEncoderViT, StockWithObjects
    ours.mask_decoder.__class__ = FoldedWithObjects
    stock.mask_decoder.objects = ours.mask_decoder.objects = objects
    theirs = SamAutomaticMaskGenerator(stock, output_mode="coco_rle")
    exact, half = FinestSam(ours), FinestSam(ours, encoder_dtype=torch.bfloat16)
    expected = [mask["segmentation"] for mask in theirs.generate(image)]
    variants = {
        "segment_anything, float32": lambda: [mask["segmentation"] for mask in theirs.generate(image)],
        "finestsam, float32": lambda: generate_masks(exact, image, settings).rles,
        "finestsam, bfloat16": lambda: generate_masks(half, image, settings).rles,
    }
    rows, reference = [], None
    for name, generate in variants.items():
        overlaps = compare_masks(generate(), expected)
        seconds, megabytes = _measure(generate, device)
        reference = reference or seconds
        rows.append(
            [name, f"{1 / seconds:.2f}", f"{reference / seconds:.1f} x", f"{megabytes:.0f}", f"{np.mean(overlaps):.5f}"]
        )
    print(f"\n{model_type}, generator, 32 x 32 points, 1800 x 1200")
    print_table(["generator", "images / s", "ratio", "peak MB", "mean IoU"], rows)


def _in_half(encode: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return encode(images)

    return run


def _with_flex(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return an encoder that uses FlexAttention."""

    def attend(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
        width = by_column.shape[-1]
        q, by_row, by_column = q.flatten(1, 2), by_row.flatten(1, 2), by_column.flatten(1, 2)

        def add_positions(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + by_row[batch, query, key // width] + by_column[batch, query, key % width]

        return flex_attention(q[:, None], k[:, None], v[:, None], score_mod=add_positions, scale=1.0)[:, 0]

    def run(images: Tensor) -> Tensor:
        original = attention.attend_folded, attention.attend_in_pieces
        attention.attend_folded = attention.attend_in_pieces = attend
        try:
            return encode(images)
        finally:
            attention.attend_folded, attention.attend_in_pieces = original

    return run


def _measure(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the median seconds and the peak of the device's memory in MB; 0 on a CPU."""
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(ROUNDS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds), torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _measure_peak(device: torch.device) -> float:
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds, _ = _measure(lambda: a @ b, device)
    return 2 * side**3 / seconds


def _count_flops(model_type: str, image_size: int) -> float:
    """Return the floating-point operations for one image: linear layers and attention, without padded windows."""
    shape = ARCHITECTURES[model_type]
    tokens = (image_size // 16) ** 2
    linear = 2 * tokens * shape.width**2 * 12 * shape.depth
    global_count = len(shape.global_blocks)
    window_count = shape.depth - global_count
    return linear + 4 * tokens * shape.width * (global_count * tokens + window_count * shape.window_size**2)


if __name__ == "__main__":
    main()
