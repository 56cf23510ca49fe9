"""Measure the memory of one training step on an image with many objects, and compare its gradient.

    python -m benchmarks.memory

vit_b with random weights, an image of 2000 x 1500, one mask per object, losses at the image's own size, the embedding
given. The memory must not grow with the number of objects. The reference is the whole batch in one pass of autograd
through segment_anything's modules, with 50 objects, since more do not fit. Every run is its own process. Memory is the
peak minus the memory of the loaded model.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import torch
from lightning.fabric import Fabric
from segment_anything.modeling import MaskDecoder

from benchmarks.generator import TUNED
from benchmarks.measure import describe_machine, print_table, run_process
from benchmarks.training import compute_losses
from finestsam.batch import Batch, Prompts, Sample
from finestsam.config import build_config
from finestsam.images.frames import compute_input_size, scale_points
from finestsam.masks import encode_mask
from finestsam.model.architectures import build_sam
from finestsam.model.sam import FinestSam
from finestsam.runtime.cpu import keep_freed_memory
from finestsam.tasks.masks import MasksTask
from finestsam.training.optim import build_optimizer
from finestsam.training.step import Stepper
from finestsam.training.trainable import freeze_

SIZE = (1500, 2000)
RUNS = {
    "whole batch, 50 objects": ("whole", 50, {}),
    "whole batch, tuned malloc, 50 objects": ("whole", 50, TUNED),
    "finestsam, 50 objects": ("chunks", 50, {}),
    "finestsam, 300 objects": ("chunks", 300, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["whole", "chunks"], help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        _run_one(given.side, given.count, Path(given.result))
        return
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, (side, count, environment) in RUNS.items():
            result = Path(folder) / "result"
            arguments = ["--side", side, "--count", str(count), "--result", str(result)]
            run_process(["-m", "benchmarks.memory", *arguments], environment)
            found[name] = json.loads(result.read_text()) | {"gradient": torch.load(result.with_suffix(".pth"))}
    own = found["finestsam, 50 objects"]
    rows = [
        [name, f"{run['seconds']:.1f}", f"{run['seconds'] / own['seconds']:.1f} x", f"{run['megabytes']:.0f}"]
        for name, run in found.items()
    ]
    print_table(["step", "s", "ratio", "peak MB beside the model"], rows)
    exact = found["whole batch, 50 objects"]["gradient"]
    print(f"gradients of 50 objects: relative difference {(own['gradient'] - exact).norm() / exact.norm():.1e}")


def _run_one(side: str, count: int, result: Path) -> None:
    torch.manual_seed(0)
    sam = build_sam("vit_b")
    config = build_config({"multimask_output": False, "opt.learning_rate": 0.0})
    model = FinestSam(sam, multimask_output=False).train()
    freeze_(model, config)
    sample = _make_sample(count)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    if side == "whole":
        sam.mask_decoder.__class__ = MaskDecoder
        compute_losses(
            sam, sample.embedding[None].float(), sample, config.losses, multimask_output=False
        ).mean().backward()
    else:
        keep_freed_memory()
        optimizer = build_optimizer(model, config.opt)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        embedder = SimpleNamespace(embed=lambda samples: torch.stack([sample.embedding.float() for sample in samples]))
        fabric = Fabric(accelerator="cpu", devices=1)
        _, optimizer = fabric.setup(model, optimizer)
        stepper = Stepper(fabric, MasksTask(config, model), optimizer, scaler, embedder)
        stepper.clip_norm = float("inf")
        stepper.step([Batch([sample])], epoch=0, wants_stop=False)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gradients = [weight.grad.flatten() for weight in sam.mask_decoder.parameters() if weight.requires_grad]
    torch.save(torch.cat(gradients), result.with_suffix(".pth"))
    result.write_text(json.dumps({"seconds": seconds, "megabytes": (peak - before) / 1e6}))


def _make_sample(count: int) -> Sample:
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    middles = generator.uniform((100, 100), (SIZE[1] - 100, SIZE[0] - 100), (count, 2))
    masks = [(columns - x) ** 2 + (rows - y) ** 2 < generator.uniform(10, 90) ** 2 for x, y in middles]
    input_size = compute_input_size(SIZE, 1024)
    points = torch.tensor(scale_points(middles, SIZE, input_size), dtype=torch.float32)[:, None]
    embedding = torch.randn(256, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    return Sample(
        1, "drawn", SIZE, input_size, None, Prompts(points, torch.ones(count, 1)), [encode_mask(m) for m in masks],
        list(range(count)), list(range(count)), embedding=embedding,
    )  # fmt: skip


if __name__ == "__main__":
    main()
