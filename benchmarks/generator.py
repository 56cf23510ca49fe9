"""Compare the automatic mask generator with segment_anything's: same weights, same thresholds, same masks.

    python -m benchmarks.generator                    vit_b, three shapes of images, float32
    python -m benchmarks.generator --precision bf16   the encoder in bfloat16
    python -m benchmarks.generator --objects filling  masks that cover the image
    python -m benchmarks.generator --crop_layers 1    four crops as well, of one image

Weights are random and the objects synthetic (synthetic.py). segment_anything runs twice: as it is, and with glibc's
allocator set to keep memory, which alone nearly halves its time. Every run is its own process; the variants take turns.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator

from benchmarks.measure import describe_machine, print_table, run_process
from benchmarks.synthetic import FoldedWithObjects, StockWithObjects, SyntheticObjects, stir_
from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig
from finestsam.data.synthetic import render_scene
from finestsam.images.frames import build_crop_boxes, build_point_grid, compute_input_size, scale_points
from finestsam.masks import decode_rle
from finestsam.model.architectures import build_sam
from finestsam.model.sam import FinestSam
from finestsam.prediction.generator import generate_masks
from finestsam.runtime.cpu import keep_freed_memory

SIZES = ((1200, 1800), (960, 640), (768, 768))
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
SIDES = {"segment_anything": ("stock", {}), "the same, tuned malloc": ("stock", TUNED), "finestsam": ("ours", {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="vit_b")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of finestsam's side")
    parser.add_argument("--objects", choices=["cells", "filling"], default="cells")
    parser.add_argument("--crop_layers", type=int, default=0)
    parser.add_argument("--tuned_only", action="store_true", help="leave segment_anything with plain malloc out")
    parser.add_argument("--side", choices=["stock", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        _run_one_side(given)
    else:
        _compare(given)


def _compare(given: argparse.Namespace) -> None:
    print(describe_machine())
    sizes = SIZES[:1] if given.crop_layers else SIZES
    sides = {name: side for name, side in SIDES.items() if not given.tuned_only or name != "segment_anything"}
    reference = next(iter(sides))
    seconds = {name: [] for name in sides}
    peaks = {name: [] for name in sides}
    overlaps, counts = [], []
    for size in sizes:
        found = {}
        for name, (side, environment) in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                result = Path(folder) / "result.json"
                arguments = ["--type", given.type, "--objects", given.objects, "--crop_layers", str(given.crop_layers)]
                arguments += ["--precision", given.precision, "--side", side, "--size", *map(str, size)]
                cost = run_process(["-m", "benchmarks.generator", *arguments, "--result", str(result)], environment)
                found[name] = json.loads(result.read_text())
            print(f"{size}, {name}: {found[name]['seconds']:.1f} s", flush=True)
            seconds[name].append(found[name]["seconds"])
            peaks[name].append(cost.peak_megabytes)
        overlaps += compare_masks(found["finestsam"]["masks"], found[reference]["masks"])
        counts.append((len(found["finestsam"]["masks"]), len(found[reference]["masks"])))
    ours = seconds["finestsam"]
    rows = [
        [
            name,
            " ".join(f"{value:.1f}" for value in values),
            f"{median(value / own for value, own in zip(values, ours, strict=True)):.1f} x",
            f"{max(peaks[name]):.0f}",
        ]
        for name, values in seconds.items()
    ]
    print_table(["generator", "s an image", "ratio", "peak MB"], rows)
    same = sum(overlap == 1 for overlap in overlaps)
    print(f"masks of both sides, by image: {counts}")
    print(f"{same} of {len(overlaps)} identical, mean IoU {np.mean(overlaps):.6f}, smallest {min(overlaps):.4f}")


def _run_one_side(given: argparse.Namespace) -> None:
    is_ours = given.side == "ours"
    if is_ours:
        keep_freed_memory()
    torch.manual_seed(0)
    sam = build_sam(given.type)
    stir_(sam.image_encoder)
    settings = GeneratorConfig(**GENERATOR_DEFAULTS | {"crop_n_layers": given.crop_layers})
    image = render_scene(0, 0, tuple(given.size)).image
    sam.mask_decoder.__class__ = FoldedWithObjects if is_ours else StockWithObjects
    sam.mask_decoder.objects = SyntheticObjects(
        sam.prompt_encoder,
        list_points(image.shape[:2], settings, sam.image_encoder.img_size),
        sam.image_encoder.img_size // 4,
        fills=given.objects == "filling",
    )
    if is_ours:
        model = FinestSam(sam, encoder_dtype=torch.bfloat16 if given.precision == "bf16" else None)
        start = time.perf_counter()
        masks = generate_masks(model, image, settings)
        seconds, rles = time.perf_counter() - start, masks.rles
    else:
        sam.image_encoder.__class__ = sam.image_encoder.__class__.__base__
        generator = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", crop_n_layers=given.crop_layers)
        start = time.perf_counter()
        found = generator.generate(image)
        seconds, rles = time.perf_counter() - start, [mask["segmentation"] for mask in found]
    texts = [_as_text(rle["counts"]) for rle in rles]
    content = {"seconds": seconds, "masks": [{"size": list(image.shape[:2]), "counts": text} for text in texts]}
    Path(given.result).write_text(json.dumps(content))


def list_points(size: tuple[int, int], settings: GeneratorConfig, image_size: int) -> torch.Tensor:
    """Return all points that a generator prompts with, in the input frame of their crop.

    segment_anything and finestsam round them differently.
    """
    points = []
    for x0, y0, x1, y1 in build_crop_boxes(size, settings.crop_n_layers, settings.crop_overlap_ratio):
        crop = (y1 - y0, x1 - x0)
        grid = build_point_grid(settings.points_per_side) * crop[::-1]
        points.append(torch.tensor(scale_points(grid, crop, compute_input_size(crop, image_size))))
    return torch.cat(points).float()


def _as_text(counts: bytes | str) -> str:
    return counts if isinstance(counts, str) else counts.decode("ascii")


def compare_masks(found: list[dict], expected: list[dict]) -> list[float]:
    """Return, for each mask of both lists, the largest IoU with a mask of the other list."""
    if not found or not expected:
        return [0.0] * max(len(found), len(expected), 1)
    sides = [np.stack([decode_rle(rle).ravel() for rle in rles]) for rles in (found, expected)]
    shared = sides[0].astype(np.float32) @ sides[1].astype(np.float32).T
    sizes = [side.sum(axis=1) for side in sides]
    ious = shared / (sizes[0][:, None] + sizes[1][None] - shared)
    return [*ious.max(axis=1).tolist(), *ious.max(axis=0).tolist()]


if __name__ == "__main__":
    main()
