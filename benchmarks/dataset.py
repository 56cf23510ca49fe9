"""Compare the check of a dataset as large as COCO's val2017 with pycocotools' loading of the same file.

    python -m benchmarks.dataset

Images and outlines are synthetic: 640 x 480 JPEGs, each different, with 36 000 outlines in COCO's mixture of sizes.
"""

import argparse
import json
import tempfile
from pathlib import Path

import cv2
import numpy as np

from benchmarks.measure import Cost, describe_machine, print_table, run_process

WIDTH, HEIGHT = 640, 480
# In COCO, the median outline has 20 corners, and areas spread over four powers of ten.
CORNERS = 20
MEDIAN_RADIUS_PIXELS, SPREAD = 28, 1.0

LOAD = "from pycocotools.coco import COCO; coco = COCO({path!r})"
DECODE = "; [coco.annToRLE(annotation) for annotation in coco.dataset['annotations']]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=36_000)
    given = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        annotations = render_dataset(root / "dataset", given.images, given.objects)
        check = ["-m", "finestsam", "--mode", "check", "--dataset", str(annotations.parent)]
        check += ["--out_dir", str(root / "out"), "--check.samples", "0"]
        kept = {"FINESTSAM_CACHE": str(root / "cache")}
        load = LOAD.format(path=str(annotations))
        costs = {
            "check, every image read": run_process(check, kept),
            "check, read before": run_process(check, kept),
            "pycocotools, file only": run_process(["-c", load]),
            "pycocotools, and each mask as run lengths": run_process(["-c", load + DECODE]),
        }
        report = json.loads((root / "out" / "dataset_report.json").read_text())
    print(f"{len(report['usable'])} usable objects of {given.objects} in {given.images} images")
    print_table(["work", "s", "cores busy", "peak MB"], [_make_row(name, cost) for name, cost in costs.items()])


def render_dataset(folder: Path, image_count: int, object_count: int) -> Path:
    """Write images and a COCO file.

    Returns:
        The annotation file.
    """
    images_dir = folder / "images"
    images_dir.mkdir(parents=True)
    generator = np.random.default_rng(0)
    images = []
    for number in range(image_count):
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        image = cv2.add(image, generator.integers(0, 24, image.shape, dtype=np.uint8))
        cv2.imwrite(str(images_dir / f"{number:05}.jpg"), image)
        images.append({"id": number, "file_name": f"{number:05}.jpg", "width": WIDTH, "height": HEIGHT})
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    annotations = []
    for number in range(object_count):
        radii = MEDIAN_RADIUS_PIXELS * np.exp(SPREAD * generator.standard_normal()) * generator.uniform(0.6, 1, CORNERS)
        centre = generator.uniform((0, 0), (WIDTH, HEIGHT))
        outline = np.clip(centre + circle * radii[:, None], 0, (WIDTH, HEIGHT)).round(2)
        corner = outline.min(axis=0)
        annotations.append(
            {
                "id": number + 1,
                "image_id": number % image_count,
                "category_id": number % 80 + 1,
                "segmentation": [outline.flatten().tolist()],
                "bbox": [*corner.tolist(), *(outline.max(axis=0) - corner).tolist()],
                "area": 1.0,
                "iscrowd": 0,
            }
        )
    categories = [{"id": number, "name": f"category {number}"} for number in range(1, 81)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def _make_row(name: str, cost: Cost) -> list[str]:
    return [name, f"{cost.seconds:.1f}", f"{cost.cores:.2f}", f"{cost.peak_megabytes:.0f}"]


if __name__ == "__main__":
    main()
