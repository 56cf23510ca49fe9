"""Compare FFT attention with SAM's attention and torch's scaled_dot_product_attention, alone and in the whole encoder.

    python -m benchmarks.fft_attention [--part attention encoder]

First, one global attention layer of vit_b's width, with projections, at 1 024, 4 096 and 16 384 tokens. Then vit_b's
encoder with one image of 1024 pixels. Every measurement is its own process, the variants take turns, and all keep
freed memory, as finestsam does. Seconds are CPU seconds, so that other work on the machine counts less. Memory is the
peak minus the memory before the measurement. A variant that needs more memory than is free is skipped.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from statistics import median

import psutil
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import describe_machine, print_table, run_process
from benchmarks.synthetic import stir_
from finestsam.model.architectures import build_sam
from finestsam.model.encoder import attend
from finestsam.model.fft_attention import FftAttention, choose_blocks, mount_fft_attention_
from finestsam.runtime.cpu import keep_freed_memory

WIDTH, HEADS = 768, 12
ROUNDS = {32: 3, 64: 2, 128: 1}  # number of processes, by side of the grid in tokens
ENCODER_ROUNDS = 1
# Calls before the timed one. In these the memory of the process grows, which takes as long as the work itself.
WARM_CALLS = 2
LAYERS = ("SAM's attention", "scaled_dot_product_attention", "finestsam's exact attention", "FFT attention")
ENCODERS = ("segment_anything", "finestsam", "FFT attention, global blocks", "FFT attention, all blocks")
# Copies of the attention scores that SAM's attention holds at once, with their gradient.
COPIES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=["attention", "encoder"], default=["attention", "encoder"])
    parser.add_argument("--variant", choices=[*LAYERS, *ENCODERS], help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(measure(given.variant, given.side)))
        return
    print(describe_machine())
    for side, rounds in ROUNDS.items() if "attention" in given.part else ():
        print(f"\n{side * side} tokens", flush=True)
        compare(LAYERS, side, rounds)
    if "encoder" in given.part:
        print("\nwhole encoder", flush=True)
        compare(ENCODERS, 0, ENCODER_ROUNDS)


def compare(variants: tuple[str, ...], side: int, rounds: int) -> None:
    """Run variants in turn, and print a table of their medians and of their speed relative to the first."""
    variants = tuple(name for name in variants if fits(name, side))
    found = {name: [] for name in variants}
    for _ in range(rounds):
        for name in variants:
            cost = run_process(["-m", "benchmarks.fft_attention", "--variant", name, "--side", str(side)])
            found[name].append(json.loads(cost.output.splitlines()[-1]))
    columns = ("forward", "both", "forward_megabytes", "both_megabytes")
    medians = {name: {key: median(run[key] for run in found[name]) for key in columns} for name in variants}
    first = medians[variants[0]]
    rows = [
        [
            name, f"{values['forward']:.3f}", f"{first['forward'] / values['forward']:.1f} x",
            f"{values['both']:.3f}", f"{first['both'] / values['both']:.1f} x",
            f"{values['forward_megabytes']:.0f}", f"{values['both_megabytes']:.0f}",
        ]
        for name, values in medians.items()
    ]  # fmt: skip
    header = ["attention", "forward, s", "ratio", "and backward, s", "ratio", "forward, MB", "and backward, MB"]
    print_table(header, rows)


def fits(name: str, side: int) -> bool:
    """Return whether the memory is large enough. Only SAM's attention stores all scores at once."""
    return name != LAYERS[0] or COPIES * HEADS * side**4 * 4 < psutil.virtual_memory().available


def measure(name: str, side: int) -> dict[str, float]:
    """Return seconds and megabytes of a forward pass without gradient, and of a forward and backward pass."""
    keep_freed_memory()
    torch.manual_seed(0)
    work, x = build_encoder(name) if name in ENCODERS else build_layer(name, side)
    with torch.no_grad():
        forward, forward_megabytes = measure_call(lambda: work(x))
    x.requires_grad_()
    both, both_megabytes = measure_call(lambda: work(x).square().mean().backward())
    return {
        "forward": forward, "both": both, "forward_megabytes": forward_megabytes,
        "both_megabytes": max(forward_megabytes, both_megabytes),
    }  # fmt: skip


def measure_call(work: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds of a call, and the megabytes by which the process grew in all calls."""
    before = psutil.Process().memory_info().rss / 1e6
    for _ in range(WARM_CALLS):
        work()
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before


def build_layer(name: str, side: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return one attention layer and its input."""
    attention = Attention(WIDTH, HEADS, use_rel_pos=True, input_size=(side, side))
    x = torch.randn(1, side, side, WIDTH)
    works = {
        LAYERS[0]: attention,
        LAYERS[1]: lambda tokens: attend_fused(attention, tokens),
        LAYERS[2]: lambda tokens: attend(attention, tokens, window_size=0),
        LAYERS[3]: FftAttention(attention),
    }
    return works[name], x


def attend_fused(attention: Attention, x: Tensor) -> Tensor:
    """Attend without relative positions: scaled_dot_product_attention would need a bias for each pair of tokens."""
    batch, height, width, _ = x.shape
    q, k, v = attention.qkv(x).reshape(batch, height * width, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v)
    return attention.proj(attended.transpose(1, 2).reshape(x.shape))


def build_encoder(name: str) -> tuple[nn.Module, Tensor]:
    """Return vit_b's encoder and an image."""
    sam = build_sam("vit_b")
    encoder = sam.image_encoder
    stir_(encoder)
    if name == ENCODERS[0]:
        encoder.__class__ = ImageEncoderViT
    blocks = {ENCODERS[2]: "global", ENCODERS[3]: "all"}.get(name, "none")
    mount_fft_attention_(sam, choose_blocks(encoder, blocks))
    return encoder, torch.randn(1, 3, encoder.img_size, encoder.img_size)


if __name__ == "__main__":
    main()
