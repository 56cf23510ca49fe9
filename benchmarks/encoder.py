"""Compare the image encoder with segment_anything's: same weights, same embedding.

    python -m benchmarks.encoder

vit_b with random weights encodes one image of 1024 pixels. Every variant runs in its own process. segment_anything runs
with and without glibc's allocator set to keep memory.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from segment_anything.modeling import ImageEncoderViT

from benchmarks.generator import TUNED
from benchmarks.measure import describe_machine, print_table, run_process
from benchmarks.synthetic import stir_
from finestsam.model.architectures import build_sam
from finestsam.runtime.cpu import keep_freed_memory

VARIANTS = {
    "segment_anything": ("stock", "float32", {}),
    "the same, tuned malloc": ("stock", "float32", TUNED),
    "finestsam": ("ours", "float32", {}),
    "finestsam, bfloat16": ("ours", "bfloat16", {}),
}
ROUNDS = 5  # of processes, the variants in turn; each process encodes once before it is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="vit_b")
    parser.add_argument("--side", choices=["stock", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        _encode(given)
        return
    print(describe_machine())
    seconds, peaks, embeddings = {name: [] for name in VARIANTS}, dict.fromkeys(VARIANTS, 0.0), {}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pth"
        for _ in range(ROUNDS):
            for name, (side, dtype, environment) in VARIANTS.items():
                arguments = ["--type", given.type, "--side", side, "--dtype", dtype, "--result", str(result)]
                cost = run_process(["-m", "benchmarks.encoder", *arguments], environment)
                found = torch.load(result)
                seconds[name].append(found["seconds"])
                peaks[name], embeddings[name] = max(peaks[name], cost.peak_megabytes), found["embedding"]
    medians = {name: median(values) for name, values in seconds.items()}
    plain, tuned, *_ = VARIANTS
    exact = embeddings[plain]
    rows = [
        [
            name, f"{value:.2f}", f"{medians[plain] / value:.1f} x", f"{medians[tuned] / value:.1f} x",
            f"{peaks[name]:.0f}", f"{(embeddings[name] - exact).norm() / exact.norm():.1e}",
        ]
        for name, value in medians.items()
    ]  # fmt: skip
    print_table(["encoder", "s", "ratio", "ratio to tuned", "peak MB", "relative difference"], rows)


@torch.no_grad()
def _encode(given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    encoder = build_sam(given.type).image_encoder
    stir_(encoder)
    if given.side == "ours":
        keep_freed_memory()
    else:
        encoder.__class__ = ImageEncoderViT
    image = torch.randn(1, 3, encoder.img_size, encoder.img_size)
    dtype = getattr(torch, given.dtype)
    seconds = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for _ in range(2):
            start = time.perf_counter()
            embedding = encoder(image).float()
            seconds.append(time.perf_counter() - start)
    torch.save({"seconds": seconds[-1], "embedding": embedding}, given.result)


if __name__ == "__main__":
    main()
