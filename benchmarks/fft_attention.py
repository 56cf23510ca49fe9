"""FFT attention against SAM's attention and torch's scaled_dot_product_attention, alone and in the whole encoder.

    python -m benchmarks.fft_attention [--part attention encoder]

One attention of vit_b's width that sees the whole image, projections included, at 1 024, 4 096 and 16 384 tokens,
then vit_b's encoder with one image of 1024 pixels. Every measurement is a process of its own, they take turns, and
all of them keep freed memory, as finestsam does (`keep_memory`). Seconds are the processor's, so that other work beside
it counts less. Memory is what a process held at most beyond what it held before. What would need more memory than there
is does not run.
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
ROUNDS = {32: 3, 64: 2, 128: 1}  # of processes, by the side of the grid in tokens
ENCODER_ROUNDS = 1
# Until the memory of the process has grown to what the work needs: that takes as long as the work.
WARM_CALLS = 2
LAYERS = ("SAM's attention", "scaled_dot_product_attention", "finestsam's exact attention", "FFT attention")
ENCODERS = ("segment_anything", "finestsam", "FFT attention, global blocks", "FFT attention, all blocks")
# Copies of all scores that SAM's attention holds at once with their gradient.
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
    """Run variants in turn and print a table of their medians and how much faster each is than the first."""
    variants = tuple(name for name in variants if fits(name, side))
    found = {name: [] for name in variants}
    for _ in range(rounds):
        for name in variants:
            cost = run_process(["-m", "benchmarks.fft_attention", "--variant", name, "--side", str(side)])
            found[name].append(json.loads(cost.output.splitlines()[-1]))
    columns = ("forward", "both", "forward_megabytes", "both_megabytes")
    medians = {name: {key: median(one[key] for one in found[name]) for key in columns} for name in variants}
    first = medians[variants[0]]
    rows = [
        [
            name, f"{one['forward']:.3f}", f"{first['forward'] / one['forward']:.1f} x",
            f"{one['both']:.3f}", f"{first['both'] / one['both']:.1f} x",
            f"{one['forward_megabytes']:.0f}", f"{one['both_megabytes']:.0f}",
        ]
        for name, one in medians.items()
    ]  # fmt: skip
    header = ["attention", "forward, s", "ratio", "and backward, s", "ratio", "forward, MB", "and backward, MB"]
    print_table(header, rows)


def fits(name: str, side: int) -> bool:
    """Whether the memory takes all scores at once, where a variant makes them."""
    return name != LAYERS[0] or COPIES * HEADS * side**4 * 4 < psutil.virtual_memory().available


def measure(name: str, side: int) -> dict[str, float]:
    """Return seconds and megabytes of a pass forward without gradient, and of one forward and backward."""
    keep_freed_memory()
    torch.manual_seed(0)
    work, x = build_encoder(name) if name in ENCODERS else build_layer(name, side)
    with torch.no_grad():
        forward, forward_megabytes = watch(lambda: work(x))
    x.requires_grad_()
    both, both_megabytes = watch(lambda: work(x).square().mean().backward())
    return {
        "forward": forward, "both": both, "forward_megabytes": forward_megabytes,
        "both_megabytes": max(forward_megabytes, both_megabytes),
    }  # fmt: skip


def watch(work: Callable[[], object]) -> tuple[float, float]:
    """Return the processor's seconds of a call, and the megabytes that the process grew by in all calls."""
    before = psutil.Process().memory_info().rss / 1e6
    for _ in range(WARM_CALLS):
        work()
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before


def build_layer(name: str, side: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return one attention and its input."""
    attention = Attention(WIDTH, HEADS, use_rel_pos=True, input_size=(side, side))
    x = torch.randn(1, side, side, WIDTH)
    works = {
        LAYERS[0]: attention,
        LAYERS[1]: lambda some: attend_fused(attention, some),
        LAYERS[2]: lambda some: attend(attention, some, window_size=0),
        LAYERS[3]: FftAttention(attention),
    }
    return works[name], x


def attend_fused(attention: Attention, x: Tensor) -> Tensor:
    """Attend without the relative positions, which scaled_dot_product_attention would want as a bias for each pair."""
    batch, height, width, _ = x.shape
    q, k, v = attention.qkv(x).reshape(batch, height * width, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(q, k, v)
    return attention.proj(seen.transpose(1, 2).reshape(x.shape))


def build_encoder(name: str) -> tuple[nn.Module, Tensor]:
    """Return vit_b's encoder and an image."""
    sam = build_sam("vit_b")
    encoder = sam.image_encoder
    stir_(encoder)
    if name == ENCODERS[0]:
        encoder.__class__ = ImageEncoderViT
    which = {ENCODERS[2]: "global", ENCODERS[3]: "all"}.get(name, "none")
    mount_fft_attention_(sam, choose_blocks(encoder, which))
    return encoder, torch.randn(1, 3, encoder.img_size, encoder.img_size)


if __name__ == "__main__":
    main()
