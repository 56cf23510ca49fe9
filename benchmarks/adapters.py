"""Compare ways to adapt SAM: trained weights, cost and quality after the same steps on the same images.

    python -m benchmarks.adapters DATASET [--epochs 12] [--only WORD ...] [-- SETTINGS OF ALL RUNS]

Each training is the real command on the built-in weights of vit_tiny. The figures are IoUs of its last weights on val
with one point per object. Megabytes are the peak of the whole process. Seconds are CPU seconds, including validation.
"""

import argparse
import re
import tempfile
from pathlib import Path

from benchmarks.measure import describe_machine, parse_with_settings, print_table, run_training

FROZEN = "--model_layer.freeze.image_encoder=true"
LORA = [FROZEN, "--model_layer.lora.rank=8"]
ADAPTERS = {
    "mask decoder": [FROZEN],
    "mask decoder, LoRA of rank 8 in the encoder's attention": LORA,
    "the same, and in its MLPs": [*LORA, "--model_layer.lora.encoder=all"],
    "LoRA alone, in the attention of encoder and decoder": [
        *LORA, "--model_layer.freeze.mask_decoder=true", "--model_layer.lora.decoder=attention",
    ],
    "mask decoder, the encoder's last 2 blocks": [FROZEN, "--model_layer.thaw.blocks=2"],
    "mask decoder and image encoder": ["--model_layer.freeze.image_encoder=false"],
}  # fmt: skip
FLAGS = ("--model.type=vit_tiny", "--eval_interval=0", "--evaluate.generator=false", "--num_workers=0")
FIGURES = {"IoU": "val_per_mask_iou", "best of three": "val_best_iou"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--only", nargs="+", default=[""], help="adapters with one of these words in their name")
    given = parse_with_settings(parser)
    print(describe_machine(), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in ADAPTERS.items():
            if any(word in name for word in given.only):
                run_folder = Path(folder) / str(len(rows))
                flags = [*FLAGS, f"--num_epochs={given.epochs}", *given.settings, *flags]
                rows += measure(name, flags, given, run_folder)
    print_table(["trains", "weights trained", "MB", "s", *FIGURES], rows)


def measure(name: str, flags: list[str], given: argparse.Namespace, folder: Path) -> list[list[str]]:
    """Return the row of one training. With the first training, the row of the untouched weights comes before it."""
    cost, figures = run_training([f"--dataset={given.dataset.resolve()}", *flags], folder)
    line = next(line for line in cost.output.splitlines() if "; trains " in line)
    trained = sum(float(count) for count in re.findall(r"(\d+\.\d+) M", line.partition("; trains ")[2]))
    megabytes, seconds = f"{cost.peak_megabytes:.0f}", f"{cost.cpu_seconds:.0f}"
    rows = [[name, f"{trained:.1f} M", megabytes, seconds, *_format(figures[-1])]]
    if folder.name == "0":
        rows.insert(0, ["untouched", "", "", "", *_format(figures[0])])
    print(rows, flush=True)
    return rows


def _format(row: dict[str, float]) -> list[str]:
    return [f"{row[column]:.3f}" for column in FIGURES.values()]


if __name__ == "__main__":
    main()
