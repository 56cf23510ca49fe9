"""Make the built-in weights of vit_tiny again, from nothing: draw scenes, train on them in stages, pack the result.

`make weights`, or `python -m recipes.builtin_weights.make --out_dir weights`; what was stopped goes on where it was.
"""

import argparse
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

from finestsam.data.synthetic import write_scenes
from finestsam.model.card import read_card, write_card
from finestsam.model.saving import save_file
from finestsam.model.weights import load_state_dict
from finestsam.tasks.base import Task
from finestsam.training.checkpoint import LAST
from recipes.builtin_weights.scenes import KINDS
from recipes.builtin_weights.train import AffinitiesAlone, MasksAndAffinities, train_stage

NAME = "vit_tiny"
SOURCE = "drawn scenes"  # what the card says that the weights were made from
# In every stage.
COMMON = (
    "--model.type", "vit_tiny", "--num_workers", "1", "--num_epochs", "1000", "--eval_interval", "1000",
    "--model_layer.freeze.image_encoder", "false", "--model_layer.freeze.prompt_encoder", "false",
    "--opt.weight_decay", "0.05", "--losses.resolution", "low", "--precision", "bf16-mixed",
    "--dataset.val_size", "0.01", "--evaluate.max_images", "2", "--dataset.labels", "partial",
    "--augment.orientations", "all", "--augment.colour", "0.5",
)  # fmt: skip
# Crops of large images, seen small.
SMALL = ("--model.image_size", "256", "--augment.crop_min", "0.2")
# The image encoder alone learns which cells belong together.
AFFINITIES = (
    "--model_layer.freeze.prompt_encoder", "true", "--model_layer.freeze.mask_decoder", "true",
    *SMALL, "--opt.learning_rate", "1e-3", "--batch_size", "8", "--dataset.max_objects", "1",
)  # fmt: skip
# All of it, from points of the grid or boxes, and it is not to forget what belongs together.
MASKS = ("--opt.rates.image_encoder", "0.4", "--prompts.use_boxes", "true", "--prompts.mix", "true")
# Such crops, and again at a lower rate; and at the size that the model is for, larger ones, then small ones too.
CROPS = (*MASKS, *SMALL, "--batch_size", "4", "--dataset.max_objects", "16", "--dataset.background_points", "4")
DETAILS = (*CROPS, "--opt.learning_rate", "1.5e-3")
PRACTICE = (*CROPS, "--opt.learning_rate", "1.2e-3")
WHOLE = (
    *MASKS, "--model.image_size", "512", "--batch_size", "2", "--dataset.max_objects", "24",
    "--dataset.background_points", "16",
)  # fmt: skip
LARGE = (*WHOLE, "--augment.crop_min", "0.3", "--opt.learning_rate", "6e-4")
CLOSE = (*WHOLE, "--augment.crop_min", "0.12", "--opt.learning_rate", "8e-4")
AFAR = (*WHOLE, "--augment.crop_min", "0.35", "--opt.learning_rate", "6e-4")
NATURAL = (*WHOLE, "--augment.crop_min", "0.25", "--opt.learning_rate", "8e-4")
# As large as the model is to see its images.
FINE = (
    *MASKS, "--model.image_size", "768", "--batch_size", "2", "--dataset.max_objects", "20",
    "--dataset.background_points", "12", "--augment.crop_min", "0.35", "--opt.learning_rate", "5e-4",
    # The thresholds that go with the weights: those of photographs, which get scores below those of drawings.
    "--generator.pred_iou_thresh", "0.3", "--generator.stability_score_thresh", "0.6",
    "--generator.box_nms_thresh", "0.7", "--generator.min_mask_region_area", "256", "--generator.points_per_side", "32",
    "--evaluate.max_images", "20", "--best_metric", "val_best_iou",
)  # fmt: skip


@dataclass(frozen=True)
class Drawings:
    """A set of scenes."""

    count: int
    side: int  # in pixels
    seed: int
    kinds: tuple[str, ...]  # of KINDS, drawn in turn


@dataclass(frozen=True)
class Stage:
    """One run of training, from what the one before it has learnt."""

    name: str
    scenes: Drawings
    warmup_steps: int
    steps: int
    decays: tuple[int, ...]  # steps after which the learning rate falls to a third
    flags: tuple[str, ...]
    task: type[Task] = MasksAndAffinities


SCENES = Drawings(3600, 512, 4, ("plans", "shapes", "blobs", "plans", "things", "parcels"))
# Large blocks, rivers and gardens, and smaller things than those.
MORE_SCENES = Drawings(
    3000, 512, 5,
    ("quarters", "shapes", "grains", "quarters", "things", "plans", "quarters", "blobs", "pebbles", "parcels"),
)  # fmt: skip
# Others of both, to be seen nearly whole, so that what is large stays in one piece.
FAR_SCENES = Drawings(
    2400, 512, 6,
    ("quarters", "things", "quarters", "blobs", "plans", "quarters", "grains", "things", "quarters", "shapes"),
)  # fmt: skip
FINE_SCENES = Drawings(
    2000, 512, 7,
    ("quarters", "things", "plans", "blobs", "quarters", "shapes", "grains", "quarters", "parcels", "pebbles"),
)  # fmt: skip
# What photographs show, beside the others.
NATURAL_SCENES = Drawings(
    3000, 640, 8,
    (
        "scenery", "quarters", "scenery", "blobs", "scenery", "things",
        "scenery", "plans", "scenery", "grains", "quarters", "shapes",
    ),
)  # fmt: skip
STAGES = (
    Stage("affinities", SCENES, 100, 1600, (1000, 1300, 1500), AFFINITIES, AffinitiesAlone),
    Stage("details", SCENES, 100, 1950, (1500, 1750, 1880), DETAILS),
    Stage("practice", SCENES, 100, 3600, (2700, 3200, 3450), PRACTICE),
    Stage("large", SCENES, 50, 900, (450, 650, 800), LARGE),
    Stage("close", MORE_SCENES, 100, 3000, (1900, 2500, 2850), CLOSE),
    Stage("afar", FAR_SCENES, 100, 1600, (700, 1150, 1450), AFAR),
    Stage("fine", FINE_SCENES, 50, 920, (450, 740, 870), FINE),
    Stage("natural", NATURAL_SCENES, 100, 1800, (1000, 1450, 1700), NATURAL),
    Stage("last", NATURAL_SCENES, 50, 1150, (550, 900, 1080), FINE),
)


def make(folder: Path, share: float = 1.0) -> Path:
    """Train all stages in `folder` and return the packed weights.

    Args:
        share: of the scenes and of the steps, to try it.
    """
    started, start = time.perf_counter(), "none"
    for stage in STAGES:
        run = _train(folder, stage, start, share)
        start = str(run / LAST)
    weights = pack(run, folder / f"{NAME}.pth")
    hours = (time.perf_counter() - started) / 3600
    print(f"{weights}: made in {hours:.2f} hours on {os.cpu_count()} cores ({platform.processor() or 'unknown'})")
    return weights


def _train(folder: Path, stage: Stage, start: str, share: float) -> Path:
    drawn = stage.scenes
    scenes = folder / f"scenes_{drawn.side}_{drawn.seed}"
    if not (scenes / "data" / "annotations.json").is_file():
        count = max(1, round(share * drawn.count))
        write_scenes(scenes, count, drawn.seed, (drawn.side, drawn.side), [KINDS[name] for name in drawn.kinds])
    steps, warmup, *decays = (max(1, round(share * step)) for step in (stage.steps, stage.warmup_steps, *stage.decays))
    run = folder / stage.name
    command = ["--max_steps", str(steps)]
    command += ["--sched.LambdaLR.warmup_steps", str(warmup)]
    command += ["--sched.LambdaLR.steps", str(sorted({step for step in decays if step > warmup}))]
    if (run / LAST).is_file():
        command += ["--resume", str(run)]
    else:
        command += ["--dataset", str(scenes), "--sav_dir", str(folder), "--run_name", stage.name]
        command += ["--model.checkpoint", start, "--sched.LambdaLR.decay_factor", "3", *COMMON, *stage.flags]
    if train_stage(stage.task, command) != 0:
        raise SystemExit(f"{run}: stopped; the same command goes on with it")
    return run


def pack(run: Path, target: Path) -> Path:
    """Write the best weights of a run in half precision, and beside them their card, which names no file of the run."""
    best = run / "best.pth"
    save_file(target, {name: value.half() for name, value in load_state_dict(best).items()})
    write_card(target, replace(read_card(best), started_from=SOURCE, started_from_sha256=None))
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, default=Path("weights"))
    parser.add_argument("--share", type=float, default=1.0, help="of the scenes and of the steps, to try it")
    given = parser.parse_args()
    make(given.out_dir, given.share)
