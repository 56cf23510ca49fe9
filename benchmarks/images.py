"""Compare the built-in weights with a random model and a classical segmentation, on labelled images of yours.

    python -m benchmarks.images DATASET [DATASET ...]

The generator's thresholds are tuned on the same images, for both models. The classical segmentation is that of
Felzenszwalb and Huttenlocher (Efficient graph-based image segmentation, 2004) in scikit-image, at three scales. All its
segments are masks, the smaller scale first. For a point, its mask is the best of the three segments that contain the
point, like SAM's best of three masks.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks.measure import describe_machine, print_table, run_process
from finestsam.config import build_config
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.read import read_evaluation_set
from finestsam.images.files import read_image
from finestsam.masks import decode_rle, encode_mask, rle_to_json
from finestsam.records import Record

SCALES = (50, 200, 800)
FIGURES = ("point/best_iou", "point/iou", "box/iou", "generator/ar_1000", "generator/ap")
SEARCH = ["--evaluate.search", "true"]
BUILTIN = ["--model.type", "vit_tiny"]
RANDOM = [*BUILTIN, "--model.checkpoint", "none"]
TIMED_IMAGES = 12  # at most, of each dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--weights", help="weights to use instead of the built-in ones")
    given = parser.parse_args()
    print(describe_machine())
    rows = []
    given.datasets = [dataset.resolve() for dataset in given.datasets]
    with tempfile.TemporaryDirectory() as folder:
        for dataset in given.datasets:
            ours = ["--model.checkpoint", given.weights] if given.weights else BUILTIN
            for name, figures, seconds in (
                (
                    given.weights or "built-in weights",
                    evaluate(dataset, ours + SEARCH, Path(folder)),
                    time_prediction(dataset, ours, Path(folder)),
                ),
                ("random weights", evaluate(dataset, RANDOM + SEARCH, Path(folder)), ""),
                ("Felzenszwalb", evaluate_classical(dataset, Path(folder)), ""),
            ):
                shown = [f"{figures[key]:.3f}" if key in figures else "" for key in FIGURES]
                rows.append([dataset.name, name, *shown, seconds])
                print(rows[-1], flush=True)
    print_table(["images", "model", *FIGURES, "s an image"], rows)


def evaluate(dataset: Path, flags: list[str], folder: Path) -> dict[str, float]:
    """Return the metrics of `--mode evaluate`, run in its own process and without earlier runs to compare with."""
    command = ["-m", "finestsam", "--mode", "evaluate", "--dataset", str(dataset), "--out_dir", str(folder / "out")]
    command += ["--evaluate.clicks", "0", "--evaluate.against", "none", "--sav_dir", str(folder / "none"), *flags]
    run_process(command)
    return json.loads((folder / "out" / "evaluation.json").read_text())


def time_prediction(dataset: Path, flags: list[str], folder: Path) -> str:
    """Return the seconds that `--mode predict` takes for an image, with reading and overlay, without the start."""
    records = read_evaluation_set(build_config({"dataset.path": str(dataset)}).dataset, "auto").val
    paths = [str(record.path) for record in records[:TIMED_IMAGES]]
    command = ["-m", "finestsam", "--mode", "predict", "--store.max_gigabytes", "0", *flags]
    output = run_process([*command, "--input", *paths, "--out_dir", str(folder / "predicted")]).output
    return re.search(r"([0-9.]+) s an image", output)[1]


def evaluate_classical(dataset: Path, folder: Path) -> dict[str, float]:
    """Return the metrics of the classical segmentation."""
    config = build_config({"dataset.path": str(dataset)})
    records = read_evaluation_set(config.dataset, "auto").val
    prompts = SampleDataset(records, SampleSettings(512, 32, 0, config.prompts, config.dataset))
    results, ious = [], []
    for position, record in enumerate(records):
        labels = segment(record)
        for rank, label_map in enumerate(labels):
            for value in np.unique(label_map):
                rle = rle_to_json(encode_mask(label_map == value))
                results.append({"image_id": record.image_id, "segmentation": rle, "score": 1 - rank / len(labels)})
        if record.annotations:
            ious += measure_points(prompts[(0, position)], record, labels)
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return evaluate(dataset, ["--evaluate.predictions", str(path)], folder) | {"point/best_iou": mean(ious)}


def segment(record: Record) -> list[np.ndarray]:
    """Return the label maps of an image, H x W, one for each scale."""
    from skimage.segmentation import felzenszwalb

    image = read_image(record.path)
    return [felzenszwalb(image, scale=scale, sigma=0.8, min_size=20) for scale in SCALES]


def measure_points(sample, record: Record, labels: list[np.ndarray]) -> list[float]:
    """Return, for each object, the IoU of the best segment at the point that SAM is prompted with."""
    height, width = record.size
    scale = max(height, width) / 512
    ious = []
    for row, point in zip(sample.rows, sample.prompts.points[:, 0].tolist(), strict=True):
        truth = decode_rle(record.rle(record.annotations[row - sample.rows[0]])).astype(bool)
        x, y = min(int(point[0] * scale), width - 1), min(int(point[1] * scale), height - 1)
        masks = [label_map == label_map[y, x] for label_map in labels]
        ious.append(max((truth & mask).sum() / (truth | mask).sum() for mask in masks))
    return ious


if __name__ == "__main__":
    main()
