"""Compare training settings, and tuned thresholds, by the quality of the generator's masks on your dataset.

    python -m benchmarks.choices DATASET [--only WORD ...] [--seeds N] [-- SETTINGS OF ALL RUNS]

Each row of the first table is one training with one setting changed; weights to start from and epochs are the same. Its
figures are those of its last weights on val, with thresholds tuned there. Each row of the second table evaluates the
weights of the first training with some thresholds tuned and the others at segment_anything's defaults.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from benchmarks.measure import describe_machine, parse_with_settings, print_table, run_process, run_training
from finestsam.config import GENERATOR_DEFAULTS

BASE = "the defaults (loss at the decoder's size)"
CHOICES = {
    BASE: [],
    "3 points an object, each prompted alone": ["--dataset.prompts_per_object", "3"],
    "no background points": ["--dataset.background_points", "0"],
    "3 corrective clicks": ["--prompts.correction_clicks", "3"],
    "points alone": ["--prompts.use_boxes", "false"],
    "point and box together": ["--prompts.mix", "false"],
    "always the centre": ["--dataset.use_center", "true"],
    "one mask": ["--multimask_output", "false"],
    "loss at the file's size": ["--losses.resolution", "original"],
    "loss at the input's size": ["--losses.resolution", "input"],
    "frozen image encoder": ["--model_layer.freeze.image_encoder", "true"],
    "LoRA of rank 8": ["--model_layer.freeze.image_encoder", "true", "--model_layer.lora.rank", "8"],
    "flips": ["--augment.orientations", "all"],
}
FIGURES = {
    "AP": "val_generator_ap",
    "AR 100": "val_generator_ar_100",
    "AR 1000": "val_generator_ar_1000",
    "F1": "val_generator_f1",
    "best IoU": "val_best_iou",
    "preferred IoU": "val_per_mask_iou",
}
SEARCHES = {
    "none": [],
    "predicted IoU": ["pred_iou_thresh"],
    "stability": ["stability_score_thresh"],
    "both": ["pred_iou_thresh", "stability_score_thresh"],
    "both and NMS": ["pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"],
    "all": list(GENERATOR_DEFAULTS),
}
SEARCH_FIGURES = {
    "AP": "generator/ap",
    "AR 100": "generator/ar_100",
    "AR 1000": "generator/ar_1000",
    "masks an image": "generator/masks_per_image",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], help="choices with one of these words in their name")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each choice; their figures are averaged")
    given = parse_with_settings(parser)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        compare_choices(given, Path(folder))
        compare_searches(given, Path(folder))


def compare_choices(given: argparse.Namespace, folder: Path) -> None:
    rows, base_seconds = [], None
    for name, flags in CHOICES.items():
        if name != BASE and not any(word in name for word in given.only):
            continue
        runs = [train(given, flags, seed, folder / f"{name}-{seed}") for seed in range(given.seeds)]
        if base_seconds is None:
            base_seconds = mean(run[1] for run in runs)
            rows.append(["untouched", "", *(f"{runs[0][0][0][key]:.3f}" for key in FIGURES.values())])
            print(rows[-1], flush=True)
        seconds = mean(run[1] for run in runs) / base_seconds
        rows.append(
            [name, f"{seconds:.1f} x", *(_average([run[0][1][key] for run in runs]) for key in FIGURES.values())]
        )
        print(rows[-1], flush=True)
    print_table(["choice", "time", *FIGURES], rows)


def _average(values: list[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def train(given: argparse.Namespace, flags: list[str], seed: int, folder: Path) -> tuple[list[dict[str, float]], float]:
    """Return the figures before and after a training, and its seconds, excluding validation."""
    flags = [f"--dataset={given.dataset.resolve()}", "--model.type=vit_tiny", "--eval_interval=0",
             f"--seed_device={seed}", *given.settings, *flags]  # fmt: skip
    _, rows = run_training(flags, folder)
    return [rows[0], rows[-1]], sum(row.get("seconds", 0.0) for row in rows)


def compare_searches(given: argparse.Namespace, folder: Path) -> None:
    rows = []
    for name, searched in SEARCHES.items():
        out = folder / "evaluation"
        fixed = [f"--generator.{key}={value}" for key, value in GENERATOR_DEFAULTS.items() if key not in searched]
        run_process(
            ["-m", "finestsam", "--mode", "evaluate", "--dataset", str(given.dataset.resolve()),
             "--model.checkpoint", str(folder / f"{BASE}-0" / "best.pth"), "--out_dir", str(out),
             "--evaluate.against", "none", "--evaluate.clicks", "0",
             "--evaluate.search", str(bool(searched)).lower(), *fixed]
        )  # fmt: skip
        figures = json.loads((out / "evaluation.json").read_text())
        rows.append([name, *(f"{figures[key]:.3f}" for key in SEARCH_FIGURES.values())])
        print(rows[-1], flush=True)
    print_table(["searched", *SEARCH_FIGURES], rows)


if __name__ == "__main__":
    main()
