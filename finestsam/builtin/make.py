"""Make the built-in weights of vit_tiny again, from nothing: draw scenes, train on them in stages, pack the result.

`make weights`, or `python -m finestsam.builtin.make --out_dir weights`; a run that was stopped goes on where it was.
"""

import argparse
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

from finestsam.cli import main as run_command
from finestsam.data.scenes import write_scenes
from finestsam.model.card import read_card, write_card
from finestsam.model.saving import save_file
from finestsam.model.weights import load_state_dict
from finestsam.training.checkpoint import LAST

NAME = "vit_tiny"
SOURCE = "drawn scenes"  # what the card says that the weights were made from
# In every stage: all of it trains, from points of the grid or boxes, and the encoder learns what belongs together.
COMMON = (
    "--model.type", "vit_tiny", "--num_workers", "1", "--num_epochs", "1000", "--eval_interval", "1000",
    "--model_layer.freeze.image_encoder", "false", "--model_layer.freeze.prompt_encoder", "false",
    "--opt.weight_decay", "0.05", "--losses.resolution", "low", "--losses.affinity_ratio", "10",
    "--prompts.use_boxes", "true", "--prompts.mix", "true", "--dataset.val_size", "0.01", "--evaluate.max_images", "8",
    "--augment.flip_horizontal", "0.5", "--augment.turn", "0.75", "--augment.hue", "0.1", "--augment.saturation", "0.5",
)  # fmt: skip


# Crops of large pictures, seen small; and these pictures whole.
DETAILS = (
    "--model.image_size", "256", "--opt.learning_rate", "1e-3", "--batch_size", "4", "--dataset.max_objects", "16",
    "--dataset.background_points", "4", "--augment.crop_min", "0.2", "--precision", "bf16-mixed",
)  # fmt: skip
WHOLE = (
    "--model.image_size", "512", "--opt.learning_rate", "4e-4", "--batch_size", "2", "--dataset.max_objects", "24",
    "--dataset.background_points", "16", "--precision", "bf16-mixed",
)  # fmt: skip


@dataclass(frozen=True)
class Drawings:
    """A set of scenes."""

    count: int
    side: int  # in pixels
    seed: int
    kinds: tuple[str, ...] | None = None  # drawn in turn; None: as the seed chooses


@dataclass(frozen=True)
class Stage:
    """One run of training, from what the one before it has learnt."""

    name: str
    scenes: Drawings
    warmup_steps: int
    steps: int
    decays: tuple[int, ...]  # steps after which the learning rate falls to a third
    flags: tuple[str, ...]


SMALL, LARGE = Drawings(6000, 256, 2026), Drawings(5000, 512, 3)
TOWNS = Drawings(4800, 512, 4, ("plans", "shapes", "blobs", "plans", "things", "parcels"))
# Small pictures first, where a step costs a fifth; then details of larger ones and these whole, again and again: each
# time the rate starts high.
STAGES = (
    Stage(
        "small", SMALL, 100, 2721, (),
        ("--model.image_size", "256", "--opt.learning_rate", "1e-3", "--batch_size", "4",
         "--dataset.max_objects", "24"),
    ),
    Stage("details", LARGE, 100, 2600, (1450, 2000, 2400), DETAILS),
    Stage("whole", LARGE, 50, 950, (550, 800), WHOLE),
    Stage("details_again", LARGE, 100, 5100, (3300, 4300, 4800), DETAILS),
    Stage("whole_again", LARGE, 50, 1150, (600, 900, 1050), WHOLE),
    Stage("details_third", LARGE, 100, 1425, (), DETAILS),
    Stage("details_of_towns", TOWNS, 100, 2200, (1400, 1850, 2080), DETAILS),
    Stage("whole_towns", TOWNS, 50, 1050, (550, 820, 950), WHOLE),
)  # fmt: skip


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
        write_scenes(scenes, count, drawn.seed, (drawn.side, drawn.side), drawn.kinds)
    steps, warmup, *decays = (max(1, round(share * step)) for step in (stage.steps, stage.warmup_steps, *stage.decays))
    run = folder / stage.name
    command = ["--mode", "train", "--max_steps", str(steps)]
    command += ["--sched.LambdaLR.warmup_steps", str(warmup)]
    command += ["--sched.LambdaLR.steps", str(sorted({step for step in decays if step > warmup}))]
    if (run / LAST).is_file():
        command += ["--resume", str(run)]
    else:
        command += ["--dataset", str(scenes), "--sav_dir", str(folder), "--run_name", stage.name]
        command += ["--model.checkpoint", start, "--sched.LambdaLR.decay_factor", "3", *COMMON, *stage.flags]
    if run_command(command) != 0:
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
