"""`--mode train`: learn epoch by epoch, validate, keep the best weights and everything needed to continue."""

import math
import random
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace

from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from finestsam.batch import Batch
from finestsam.config import Config, flatten_config
from finestsam.data.labels import describe_labels
from finestsam.errors import UserError, printable
from finestsam.model.load import RANDOM_WEIGHTS, choose_device
from finestsam.model.saving import CheckpointNotSaved
from finestsam.presets import describe_preset
from finestsam.runtime.cpu import set_processor
from finestsam.runtime.ranks import Ranks
from finestsam.runtime.signals import Interrupted, watch_signals
from finestsam.training.best import choose_metric, keep_if_best, rank, refuse_lost_best, warn_if_not_saved
from finestsam.training.blend import blend_best, keep_start, wants_blend
from finestsam.training.classes import describe_categories
from finestsam.training.crash import note_crash
from finestsam.training.hints import describe_training, list_mismatches, warn_of_counts, warn_of_cpu, warn_of_schedule
from finestsam.training.log import BOX_AND_CLICK_COLUMNS, RunLog, show_progress
from finestsam.training.memory import OutOfMemory, list_savings
from finestsam.training.numbers import explain_end, has_finite_weights, skips_for_good
from finestsam.training.optim import learning_rate_of
from finestsam.training.plots import plot_curves
from finestsam.training.run import Run, build_run, count_steps, save_last
from finestsam.training.step import Stepper
from finestsam.training.validation import validate

EXIT_NUMERICAL = 3
# Nobody minds a validation of so long.
CHEAP_SECONDS = 10


def train(config: Config, stepper_kind: type[Stepper] | None = None) -> int:
    """Fine-tune as the settings say, and return the exit code.

    Args:
        stepper_kind: takes the steps; None: that of the task.
    """
    if config.device != "tpu":
        choose_device(config.device)  # so that a device that is not there is told in our words
    try:
        fabric = Fabric(
            accelerator=config.device,
            devices=config.num_devices,
            num_nodes=config.num_nodes,
            precision="32-true",  # the model itself autocasts its encoder; Fabric would round coordinates as well
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--num_devices {config.num_devices} of device {config.device}: {reason}") from None
    return fabric.launch(_train, config, stepper_kind)


def _train(fabric: Fabric, config: Config, stepper_kind: type[Stepper] | None) -> int:
    set_processor()
    seed = fabric.broadcast(random.getrandbits(31) if config.seed_device is None else config.seed_device)
    fabric.seed_everything(seed, verbose=False)
    with watch_signals() as interruption, interruption.held():
        ranks = Ranks(fabric, interruption)
        try:
            with build_run(fabric, ranks, replace(config, seed_device=seed), stepper_kind) as run, note_crash(run):
                code = _train_run(run)
        except Interrupted as error:
            if fabric.global_rank == 0:
                raise
            code = error.exit_code
    # Fabric ends a job at once when any process but the first has another code, and the first may not be done yet.
    return code if fabric.global_rank == 0 else 0


def _train_run(run: Run) -> int:
    _print_start(run)
    if _is_complete(run, run.progress.epoch) and not wants_blend(run):
        run.fabric.print(f"already complete: {run.progress.epoch} epochs; --num_epochs above that continues")
        return 0
    with _open_log(run) as log:
        try:
            return run_epochs(run, log)
        finally:
            _plot_curves(run, log)


def _open_log(run: Run) -> AbstractContextManager[RunLog | None]:
    if not run.is_first_rank:
        return nullcontext()
    resumed_epoch = run.progress.epoch if run.config.resume else None
    columns = run.stepper.columns
    if run.config.evaluate.all_prompts and not run.is_semantic:
        columns += BOX_AND_CLICK_COLUMNS
    return closing(RunLog(run.folder, resumed_epoch, run.config.num_epochs, columns))


def run_epochs(run: Run, log: RunLog | None) -> int:
    """Validate the baseline, then learn and validate until the end, a signal, or numbers that are not finite."""
    progress = run.progress
    try:
        if progress.step == 0 and not progress.baseline:
            _measure_baseline(run, log)
        while not _is_complete(run, progress.epoch):
            with _saving_at_a_mistake(run):
                train_epoch(run, log)
                reason = explain_end(run)
                if reason:
                    run.fabric.print(reason, file=sys.stderr)
                    return EXIT_NUMERICAL
                finish_epoch(run, log)
            if _is_complete(run, progress.epoch):
                _save_surely(run)
            else:
                run.saving.do_if_due(lambda: _save_if_possible(run))
    except Interrupted as error:
        return _save_and_print(run, error)
    run.ranks.join(lambda: refuse_lost_best(run), may_stop=False)
    try:
        if wants_blend(run):
            blend_best(run, validate)
            _save_if_possible(run)
    except Interrupted as error:
        run.fabric.print(f"stopped while original weights were put back; to go on: --mode train --resume {run.folder}")
        return error.exit_code
    _print_end(run)
    return 0


def _measure_baseline(run: Run, log: RunLog | None) -> None:
    """Validate the baseline, which is the first to beat."""
    keep_start(run)
    validate(run)
    run.progress.baseline = dict(run.progress.metrics)
    run.progress.baseline_generator = dict(run.progress.generator)
    keep_if_best(run)
    _write_row(run, log, learning_rate=None, epoch=0)
    run.saving.do(lambda: _save_if_possible(run))


def train_epoch(run: Run, log: RunLog | None) -> None:
    """Take the steps of one epoch that are left, at most to max_steps.

    Raises:
        Interrupted: a signal came to any rank; between two steps.
    """
    progress, sampler = run.progress, run.sampler
    sampler.epoch, sampler.first_batch = progress.epoch, progress.batches_done
    accumulate = run.config.opt.accumulate_batches
    started = time.perf_counter()
    windows = _group_batches(run.train_loader, accumulate)
    total = math.ceil(len(sampler) / accumulate)
    for batches in show_progress(windows, f"epoch {progress.epoch + 1}", total, run.is_first_rank):
        on_device = [batch.to(run.fabric.device) for batch in batches]
        sums, objects, is_finite, wants_stop = _step(run, on_device)
        progress.batches_done += len(batches)
        _count_step(run, log, sums, objects, is_finite)
        if wants_stop and has_finite_weights(run):  # broken ones end the run for that, and are not saved
            progress.seconds += time.perf_counter() - started
            raise Interrupted(run.ranks.find_signal())
        if skips_for_good(run) or 0 < run.config.max_steps <= progress.step:
            break
    progress.seconds += time.perf_counter() - started


def _step(run: Run, batches: list[Batch]) -> tuple[dict[str, float], int, bool, bool]:
    """Take a step, as Stepper.step says.

    Raises:
        UserError: the memory of any rank is too small.
    """
    try:
        return run.stepper.step(batches, run.progress.epoch, run.ranks.was_signalled)
    except OutOfMemory as error:
        text = str(error)  # without what hangs on the error

    def refuse() -> None:
        if text:
            savings = ", ".join(list_savings(run.config, run.loaded.model))
            raise UserError(
                f"{text} even for one object at a time; less is needed with {savings}; then go on with --mode train "
                f"--resume {run.folder}"
            )

    run.ranks.join(refuse, may_stop=False)
    raise AssertionError("a step that failed nowhere")


def _count_step(run: Run, log: RunLog | None, sums: dict[str, float], objects: int, is_finite: bool) -> None:
    progress = run.progress
    progress.chunk_objects = run.stepper.chunk_objects  # which falls where the memory turns out to be too small
    if not is_finite:
        progress.skipped_steps += 1
        progress.all_skipped_steps += 1
        shares = run.ranks.gather(lambda: run.stepper.nonfinite_images, may_stop=False)
        names = ", ".join(printable(name) for share in shares for name in share)
        run.fabric.print(f"step {progress.step + 1} skipped: loss or gradient is not finite: {names}", file=sys.stderr)
        return
    if objects == 0:
        return
    progress.skipped_steps = 0
    progress.step += 1
    progress.objects += objects
    for name, value in sums.items():
        progress.sums[name] += value
    if log:
        means = {name: value / objects for name, value in sums.items()}
        log.log_step(progress.step, means | {"learning_rate": _learning_rate(run)})
    if run.config.sched.type == "LambdaLR":
        run.scheduler.step()


def finish_epoch(run: Run, log: RunLog | None) -> None:
    """Validate where it is due, step the plateau, keep the best, write the row and the curves, begin the next epoch.

    An epoch that max_steps cut short is validated and written like a whole one, and stays open for a run that is
    continued with more steps: neither the plateau nor early stopping counts it.

    Raises:
        Interrupted: a signal came during validation; the epoch is not finished, and nothing else has changed.
    """
    progress, interval = run.progress, run.config.eval_interval
    is_whole = progress.batches_done >= run.sampler.batches_per_epoch
    epoch = progress.epoch + is_whole
    is_due = interval > 0 and epoch % interval == 0
    learning_rate = _learning_rate(run)
    progress.metrics, progress.validation_seconds = {}, 0.0
    if is_due or _is_complete(run, epoch):
        validate(run)
        if epoch == interval:
            _print_cost(run)
        if is_whole and run.config.sched.type == "ReduceLROnPlateau":
            fallback = -progress.sums["total_loss"] / max(progress.objects, 1)
            run.scheduler.step(progress.metrics.get(choose_metric(run), fallback))
        without_better = progress.evaluations_without_better
        keep_if_best(run)
        if not is_whole:
            progress.evaluations_without_better = without_better
    progress.epoch = epoch
    _write_row(run, log, learning_rate, epoch=progress.epoch + (not is_whole))
    if is_whole:
        progress.batches_done, progress.objects, progress.seconds = 0, 0, 0.0
        progress.sums = dict.fromkeys(run.stepper.measures, 0.0)


def _print_cost(run: Run) -> None:
    """Tell how to validate for less where it takes longer than to learn."""
    learning, validating = run.progress.seconds, run.progress.validation_seconds
    if validating > max(learning, CHEAP_SECONDS):
        run.fabric.print(
            f"validation took {validating:.0f} s, the epoch {learning:.0f} s; a larger --eval_interval or "
            "fewer images for the generator (--evaluate.max_images) make it cheaper"
        )


def _write_row(run: Run, log: RunLog | None, learning_rate: float | None, epoch: int) -> None:
    if log is None:
        return
    progress = run.progress
    means = {name: value / progress.objects for name, value in progress.sums.items()} if progress.objects else {}
    row = {"epoch": epoch, "step": progress.step, "seconds": progress.seconds or None, **means}
    row["validation_seconds"] = progress.validation_seconds or None
    log.log_epoch(row | {"learning_rate": learning_rate} | progress.metrics, baseline=progress.baseline)
    if epoch > 0:
        for hint in warn_of_counts(progress.metrics, run.config.dataset.labels):
            print(f"hint: {hint}")
    run.drawing.do_if_due(lambda: _plot_curves(run, log))


def _plot_curves(run: Run, log: RunLog | None) -> None:
    if log is None:
        return
    try:
        plot_curves(log.read_rows(), run.folder)
    except OSError as error:
        print(f"curves not drawn: {error}", file=sys.stderr)


def _is_complete(run: Run, epoch: int) -> bool:
    """Whether a run ends after so many complete epochs."""
    config, progress = run.config, run.progress
    patience = config.early_stop_evaluations
    return (
        epoch >= config.num_epochs
        or 0 < config.max_steps <= progress.step
        or 0 < patience <= progress.evaluations_without_better
    )


def _learning_rate(run: Run) -> float:
    return learning_rate_of(run.stepper.optimizer)


def _group_batches(loader: Iterable[tuple[Batch, list[str]]], count: int) -> Iterator[list[Batch]]:
    """Yield `count` batches at a time, and what is left at the end of the epoch."""
    group = []
    for batch, messages in loader:
        for message in messages:
            print(f"skipped: {message}", file=sys.stderr)
        group.append(batch)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


@contextmanager
def _saving_at_a_mistake(run: Run) -> Iterator[None]:
    """Keep what was learnt before the memory, say, is too small for a step or a validation."""
    try:
        yield
    except UserError:
        _save_if_possible(run)
        raise


def _save_if_possible(run: Run) -> None:
    warn_if_not_saved(lambda: save_last(run))


def _save_surely(run: Run) -> None:
    """Save the last checkpoint of a run.

    Raises:
        UserError: the disk does not take it.
    """

    def save() -> None:
        try:
            save_last(run)
        except CheckpointNotSaved as error:
            raise UserError(f"{error}; {error.advice}, then go on with --mode train --resume {run.folder}") from None

    run.ranks.join(save, may_stop=False)


def _save_and_print(run: Run, reason: Interrupted) -> int:
    """Save where a signal stopped the run, say how to go on, and return the exit code."""
    _save_surely(run)
    run.fabric.print(f"stopped at step {run.progress.step}; to go on: --mode train --resume {run.folder}")
    return reason.exit_code


def _print_start(run: Run) -> None:
    say = run.fabric.print
    say(f"layout: {run.data.layout}")
    say("\n".join(run.data.report.list_lines()))
    say(f"training on {len(run.data.train)} images, validating on {len(run.data.val)}")
    say("\n".join(describe_labels(run.data.train, run.config.dataset.labels)))
    if not run.config.resume:
        for line in describe_preset(run.config.preset, flatten_config(run.config)):
            say(line)
    say(f"{run.progress.started_from}: {describe_training(run.loaded.model, run.loaded.model_type)}")
    if run.is_semantic:
        say(f"classes: {', '.join(run.classes.names)}")
    else:
        if run.classes:
            say(describe_categories(run.classes, run.data.train))
        say(f"objects decoded at a time: up to {run.stepper.chunk_objects}")
    for line in run.cost:
        say(line)
    steps = count_steps(run.config, len(run.data.train), run.fabric.world_size)
    warnings = list_mismatches(run.config, run.progress.started_from == RANDOM_WEIGHTS)
    warnings += warn_of_cpu(run.config, run.fabric.device.type, run.loaded.model, run.loaded.model_type)
    for warning in warnings + warn_of_schedule(run.config, steps):
        say(f"warning: {warning}")
    if run.val_loader is None:
        say("warning: nothing to validate on; best.pth is the newest weights")
    say(f"run: {run.folder}")


def _print_end(run: Run) -> None:
    progress = run.progress
    if progress.all_skipped_steps:
        run.fabric.print(f"{progress.all_skipped_steps} steps were skipped: loss or gradient was not finite")
    if progress.best is not None:
        name = choose_metric(run)
        baseline, best = progress.baseline.get(name, math.nan), rank(run, progress.best)
        if best > rank(run, progress.baseline):
            run.fabric.print(f"best {name} {best[0]:.4f}, baseline {baseline:.4f}")
        else:
            run.fabric.print(f"no epoch beat the baseline ({name} {baseline:.4f}): best.pth holds its weights")
    for title, name in (("weights", "best.pth"), ("curves", "plots"), ("figures", "metrics.csv")):
        run.fabric.print(f"{title}: {run.folder / name}")
    folder = shlex.quote(str(run.folder))
    command = f"python -m finestsam --model.checkpoint {folder}"
    run.fabric.print(f"to measure it: {command} --mode evaluate --dataset {shlex.quote(run.config.dataset.path)}")
    run.fabric.print(f"to use it:     {command} --mode predict --input IMAGE_OR_FOLDER")
