"""Measure the loss of quality with FFT attention: the same training with SAM's attention and with FFT attention.

    python -m benchmarks.fft_price FOLDER [FOLDER ...] [--task masks semantic] [--steps 120] [--seeds 1337]

Each training is the real command on the built-in weights of vit_tiny, with the same images, order, steps and settings.
The image encoder is trained. FFT attention is first distilled (`model_layer.fft_attention.distill_steps`); the CPU
seconds include this. `masks` measures the IoU of masks from one point per object, `semantic` measures mIoU and Dice of
pixel classes. Both use the quarter of the images that is not trained on.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from benchmarks.measure import describe_machine, print_table, run_training

BLOCKS = {"SAM's": "none", "FFT, global blocks": "global", "FFT, all blocks": "all"}
FIGURES = {
    "masks": {"IoU": "val_per_mask_iou", "IoU, best of three": "val_best_iou", "Dice": "val_per_mask_dice"},
    "semantic": {"mIoU": "val_miou", "Dice": "val_mdice"},
}
WARMUP_STEPS = 20
FLAGS = (
    "--model.type=vit_tiny", "--model_layer.freeze.image_encoder=false", "--opt.learning_rate=2e-4",
    "--losses.resolution=low", "--dataset.max_objects=16", "--dataset.val_size=0.25", "--augment.orientations=mirrored",
    "--sched.LambdaLR.steps=[]",
    "--evaluate.generator=false", "--eval_interval=0", "--num_epochs=100000", "--num_workers=0", "--device=cpu",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", type=Path, help="folders of labelled images")
    parser.add_argument("--task", nargs="+", choices=FIGURES, default=["masks"])
    parser.add_argument("--steps", type=int, default=120, help="steps of one image each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337])
    given = parser.parse_args()
    print(describe_machine(), flush=True)
    for dataset in given.datasets:
        for task in given.task:
            print(f"\n{dataset.name}, {task}, {given.steps} steps, mean of {len(given.seeds)} seeds", flush=True)
            compare(dataset, task, given.steps, given.seeds)


def compare(dataset: Path, task: str, steps: int, seeds: list[int]) -> None:
    """Train with each attention and print a table: before and after training, and the difference to SAM's attention."""
    found = {name: [train(dataset, task, steps, blocks, seed) for seed in seeds] for name, blocks in BLOCKS.items()}
    means = {name: {key: mean(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    first = means[next(iter(BLOCKS))]
    rows = []
    for name, figures in means.items():
        row = [name, f"{figures['seconds']:.0f}"]
        for column in FIGURES[task].values():
            after = figures[f"after {column}"]
            row += [f"{figures[f'before {column}']:.3f}", f"{after:.3f}", f"{after - first[f'after {column}']:+.3f}"]
        rows.append(row)
    header = ["attention", "CPU s"]
    for figure in FIGURES[task]:
        header += [f"{figure} before", "after", "difference"]
    print_table(header, rows)


def train(dataset: Path, task: str, steps: int, blocks: str, seed: int) -> dict[str, float]:
    """Run one training, and return its figures before and after, and its CPU seconds."""
    decay_step = WARMUP_STEPS + 2 * steps // 3
    with TemporaryDirectory() as folder:
        cost, rows = run_training(
            [f"--dataset={dataset}", f"--task={task}", f"--max_steps={steps}", f"--seed_device={seed}",
             f"--model_layer.fft_attention.blocks={blocks}", f"--sched.LambdaLR.warmup_steps={WARMUP_STEPS}",
             f"--sched.LambdaLR.steps=[{decay_step}]", "--sched.LambdaLR.decay_factor=4", *FLAGS],
            Path(folder) / "run",
        )  # fmt: skip
    figures = {"seconds": cost.cpu_seconds}
    for column in FIGURES[task].values():
        figures |= {f"before {column}": rows[0][column], f"after {column}": rows[-1][column]}
    text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{dataset.name}, {task}, FFT blocks {blocks}, seed {seed}: {text}", file=sys.stderr, flush=True)
    return figures


if __name__ == "__main__":
    main()
