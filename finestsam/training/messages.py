"""What a run prints at its start, at its end, and about the time that its validation takes."""

import math
import shlex

from finestsam.config import flatten_config
from finestsam.data.labels import describe_labels
from finestsam.model.load import RANDOM_WEIGHTS
from finestsam.presets import describe_preset
from finestsam.tasks.base import Validation
from finestsam.training.best import choose_metric, rank
from finestsam.training.hints import describe_training, list_mismatches, warn_of_cpu, warn_of_schedule
from finestsam.training.run import Run
from finestsam.training.run_folder import RunFolder
from finestsam.training.setup import count_steps
from finestsam.training.state import Progress

# A validation that takes so long needs no advice.
CHEAP_SECONDS = 10


def print_start(run: Run, progress: Progress, folder: RunFolder) -> None:
    """Print what is learned from what, what a step costs, and warnings about the settings."""
    config, loaded, task = run.config, run.loaded, run.task
    lines = [
        f"layout: {run.data.layout}",
        "\n".join(run.data.report.list_lines()),
        f"training on {len(run.data.train)} images, validating on {len(run.data.val)}",
        "\n".join(describe_labels(run.data.train, config.dataset.labels)),
        *(describe_preset(config.preset, flatten_config(config)) if not config.resume else ()),
        f"{progress.started_from}: {describe_training(loaded.model, loaded.model_type)}",
        *task.describe_start(run.data),
    ]
    if task.prompts_objects:
        lines.append(f"objects decoded at a time: up to {run.stepper.chunk_objects}")
    lines += run.cost
    steps = count_steps(config, len(run.data.train), run.fabric.world_size)
    warnings = list_mismatches(config, progress.started_from == RANDOM_WEIGHTS, task.prompts_objects)
    warnings += warn_of_cpu(config, run.fabric.device.type, loaded.model, loaded.model_type)
    lines += [f"warning: {warning}" for warning in warnings + warn_of_schedule(config, *steps)]
    if run.val_loader is None:
        lines.append("warning: nothing to validate on; best.pth is the newest weights")
    for line in [*lines, f"run: {folder.path}"]:
        run.fabric.print(line)


def print_cost(run: Run, progress: Progress, validation: Validation) -> None:
    """Print how to validate for less where it takes longer than the epoch."""
    learning, validating = progress.seconds, validation.seconds
    if validating > max(learning, CHEAP_SECONDS):
        run.fabric.print(
            f"validation took {validating:.0f} s, the epoch {learning:.0f} s; a larger --eval_interval or "
            "fewer images for the generator (--evaluate.max_images) make it cheaper"
        )


def print_end(run: Run, progress: Progress, folder: RunFolder) -> None:
    """Print the best metric beside the baseline's, and where everything is."""
    say = run.fabric.print
    if progress.all_skipped_steps:
        say(f"{progress.all_skipped_steps} steps were skipped: loss or gradient was not finite")
    if progress.best is not None:
        name = choose_metric(run, progress)
        baseline, best = progress.baseline.get(name, math.nan), rank(run, progress, progress.best)
        if best > rank(run, progress, progress.baseline):
            say(f"best {name} {best[0]:.4f}, baseline {baseline:.4f}")
        else:
            say(f"no epoch beat the baseline ({name} {baseline:.4f}): best.pth holds its weights")
    for title, name in (("weights", "best.pth"), ("curves", "plots"), ("figures", "metrics.csv")):
        say(f"{title}: {folder.path / name}")
    quoted = shlex.quote(str(folder.path))
    command = f"python -m finestsam --model.checkpoint {quoted}"
    say(f"to measure it: {command} --mode evaluate --dataset {shlex.quote(run.config.dataset.path)}")
    say(f"to use it:     {command} --mode predict --input IMAGE_OR_FOLDER")
