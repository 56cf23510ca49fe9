"""`--mode train`: learn epoch by epoch, validate, keep the best weights and everything needed to continue."""

import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from finestsam.batch import Batch
from finestsam.config import Config
from finestsam.errors import UserError, printable
from finestsam.model.load import choose_device
from finestsam.model.saving import CheckpointNotSaved
from finestsam.runtime.cpu import set_processor
from finestsam.runtime.ranks import Ranks
from finestsam.runtime.signals import Interrupted, watch_signals
from finestsam.tasks import choose_task
from finestsam.tasks.base import Task, Validation
from finestsam.training import checkpoint
from finestsam.training.best import choose_metric, keep_if_best, refuse_lost_best, warn_if_not_saved
from finestsam.training.blend import blend_best, keep_start, wants_blend
from finestsam.training.crash import note_crash
from finestsam.training.hints import warn_of_counts
from finestsam.training.log import show_progress
from finestsam.training.memory import OutOfMemory, list_savings
from finestsam.training.messages import print_cost, print_end, print_start
from finestsam.training.numbers import explain_end, has_finite_weights, skips_for_good
from finestsam.training.optim import learning_rate_of
from finestsam.training.run import Run
from finestsam.training.run_folder import RunFolder
from finestsam.training.setup import set_up
from finestsam.training.state import Progress, RunState
from finestsam.training.step import StepResult
from finestsam.training.validation import validate

EXIT_NUMERICAL = 3


def train(config: Config, task: type[Task] | None = None) -> int:
    """Fine-tune as the settings say, and return the exit code.

    Args:
        task: what is trained; None: what the setting `task` names.
    """
    if config.device != "tpu":
        choose_device(config.device)  # so that the message about a missing device is ours
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
    return fabric.launch(_train, config, task or choose_task(config))


def _train(fabric: Fabric, config: Config, task: type[Task]) -> int:
    set_processor()
    seed = fabric.broadcast(random.getrandbits(31) if config.seed_device is None else config.seed_device)
    fabric.seed_everything(seed, verbose=False)
    with watch_signals() as interruption, interruption.held():
        ranks = Ranks(fabric, interruption)
        try:
            run, state, folder = set_up(fabric, ranks, replace(config, seed_device=seed), task)
            with run, folder, note_crash(run, state, folder):
                code = _train_run(run, state, folder)
        except Interrupted as error:
            if fabric.global_rank == 0:
                raise
            code = error.exit_code
    # Fabric ends a job at once when any process but the first has another code, and the first may not be done yet.
    return code if fabric.global_rank == 0 else 0


def _train_run(run: Run, state: RunState, folder: RunFolder) -> int:
    config, progress = run.config, state.progress
    print_start(run, progress, folder)
    if _is_complete(config, progress, progress.epoch) and not wants_blend(run, progress):
        run.fabric.print(f"already complete: {progress.epoch} epochs; --num_epochs above that continues")
        return 0
    folder.open_log(run.task, config.num_epochs, progress.epoch if config.resume else None)
    try:
        return run_epochs(run, state, folder)
    finally:
        folder.plot_curves()


def run_epochs(run: Run, state: RunState, folder: RunFolder) -> int:
    """Validate the baseline, then learn and validate until the end, a signal, or numbers that are not finite."""
    progress = state.progress
    try:
        if progress.step == 0 and not progress.baseline:
            _measure_baseline(run, state, folder)
        while not _is_complete(run.config, progress, progress.epoch):
            with _saving_at_a_mistake(run, state, folder):
                train_epoch(run, state, folder)
                reason = explain_end(state)
                if reason:
                    run.fabric.print(reason, file=sys.stderr)
                    return EXIT_NUMERICAL
                finish_epoch(run, state, folder)
            if _is_complete(run.config, progress, progress.epoch):
                _save_surely(run, state, folder)
            else:
                folder.saving.do_if_due(lambda: _save_if_possible(run, state, folder))
    except Interrupted as error:
        return _save_interrupted(run, state, folder, error)
    run.ranks.join(lambda: refuse_lost_best(progress, folder), may_stop=False)
    try:
        if wants_blend(run, progress):
            blend_best(run, state, folder, validate)
            _save_if_possible(run, state, folder)
    except Interrupted as error:
        run.fabric.print(f"stopped while original weights were put back; to go on: --mode train --resume {folder.path}")
        return error.exit_code
    print_end(run, progress, folder)
    return 0


def _measure_baseline(run: Run, state: RunState, folder: RunFolder) -> None:
    """Validate the weights that training starts from, which are the first to beat."""
    keep_start(run, folder)
    commit_validation(run, state, folder, validate(run), epoch=0)
    folder.saving.do(lambda: _save_if_possible(run, state, folder))


def train_epoch(run: Run, state: RunState, folder: RunFolder) -> None:
    """Take the steps of one epoch that are left, at most to max_steps.

    Raises:
        Interrupted: a signal came to any rank; between two steps.
    """
    progress, sampler = state.progress, run.sampler
    sampler.epoch, sampler.first_batch = progress.epoch, progress.batches_done
    accumulate = run.config.opt.accumulate_batches
    started = time.perf_counter()
    windows = _group_batches(run.train_loader, accumulate)
    total = math.ceil(len(sampler) / accumulate)
    for batches in show_progress(windows, f"epoch {progress.epoch + 1}", total, run.is_first_rank):
        result = _step(run, progress.epoch, [batch.to(run.fabric.device) for batch in batches], folder)
        progress.batches_done += len(batches)
        _count_step(run, state, folder, result)
        if result.wants_stop and has_finite_weights(state.model):  # broken ones end the run, and are not saved
            progress.seconds += time.perf_counter() - started
            raise Interrupted(run.ranks.find_signal())
        if skips_for_good(state) or 0 < run.config.max_steps <= progress.step:
            break
    progress.seconds += time.perf_counter() - started


def _step(run: Run, epoch: int, batches: list[Batch], folder: RunFolder) -> StepResult:
    """Take a step.

    Raises:
        UserError: the memory of any rank is too small.
    """
    try:
        return run.stepper.step(batches, epoch, run.ranks.was_signalled)
    except OutOfMemory as error:
        text = str(error)  # without what hangs on the error

    def refuse() -> None:
        if text:
            raise UserError(
                f"{text} even for one object at a time; less is needed with {', '.join(list_savings(run.task))}; then "
                f"go on with --mode train --resume {folder.path}"
            )

    run.ranks.join(refuse, may_stop=False)
    raise AssertionError("a step that failed nowhere")


def _count_step(run: Run, state: RunState, folder: RunFolder, result: StepResult) -> None:
    """Commit what a step has done: its counters, its log, the schedule."""
    progress = state.progress
    progress.chunk_objects = run.stepper.chunk_objects  # which falls where the memory turns out to be too small
    if not result.is_finite:
        progress.skipped_steps += 1
        progress.all_skipped_steps += 1
        shares = run.ranks.gather(lambda: result.broken_images, may_stop=False)
        names = ", ".join(printable(name) for share in shares for name in share)
        run.fabric.print(f"step {progress.step + 1} skipped: loss or gradient is not finite: {names}", file=sys.stderr)
        return
    if result.count == 0:
        return
    progress.take_step(result.sums, result.count)
    if folder.log:
        means = {name: value / result.count for name, value in result.sums.items()}
        folder.log.log_step(progress.step, means | {"learning_rate": learning_rate_of(state.optimizer)})
    if run.config.sched.type == "LambdaLR":
        state.scheduler.step()


def finish_epoch(run: Run, state: RunState, folder: RunFolder) -> None:
    """Validate where it is due, and commit the epoch.

    An epoch that max_steps cut short is validated and written like a whole one, and stays open for a run that is
    continued with more steps: neither the plateau nor early stopping counts it.

    Raises:
        Interrupted: a signal came during validation; the epoch is not finished, and nothing else has changed.
    """
    progress, interval = state.progress, run.config.eval_interval
    is_whole = progress.batches_done >= run.sampler.batches_per_epoch
    epoch = progress.epoch + is_whole
    is_due = interval > 0 and epoch % interval == 0
    validation = validate(run) if is_due or _is_complete(run.config, progress, epoch) else None
    if validation and epoch == interval:
        print_cost(run, progress, validation)
    commit_validation(run, state, folder, validation, progress.epoch + 1, is_whole)


def commit_validation(
    run: Run, state: RunState, folder: RunFolder, validation: Validation | None, epoch: int, is_whole: bool = True
) -> None:
    """Take up what an epoch has measured: counters, plateau, best weights, row and curves. Nothing else does.

    Args:
        validation: None: the epoch had none.
        epoch: 0: the baseline, before the first step.
        is_whole: False: the epoch was cut short and stays open.
    """
    progress, is_baseline = state.progress, epoch == 0
    learning_rate = None if is_baseline else learning_rate_of(state.optimizer)
    progress.take_validation(validation)
    if is_baseline:
        progress.baseline, progress.baseline_generator = dict(progress.metrics), dict(progress.generator)
    if validation:
        if is_whole and not is_baseline:
            _step_plateau(run, state)
        without_better = progress.evaluations_without_better
        keep_if_best(run, state, folder, validation)
        if not is_whole:
            progress.evaluations_without_better = without_better
    if is_whole:
        progress.epoch = epoch
    _write_row(run, progress, folder, learning_rate, epoch)
    if is_whole:
        progress.begin_epoch(run.task.measures)


def _step_plateau(run: Run, state: RunState) -> None:
    progress = state.progress
    if run.config.sched.type == "ReduceLROnPlateau":
        fallback = -progress.sums["total_loss"] / max(progress.objects, 1)
        state.scheduler.step(progress.metrics.get(choose_metric(run, progress), fallback))


def _write_row(run: Run, progress: Progress, folder: RunFolder, learning_rate: float | None, epoch: int) -> None:
    if folder.log is None:
        return
    row = {"epoch": epoch, "step": progress.step, "seconds": progress.seconds or None, **progress.means}
    row |= {"validation_seconds": progress.validation_seconds or None, "learning_rate": learning_rate}
    folder.log.log_epoch(row | progress.metrics, baseline=progress.baseline)
    if epoch > 0:
        for hint in warn_of_counts(progress.metrics, run.config.dataset.labels):
            print(f"hint: {hint}")
    folder.plotting.do_if_due(folder.plot_curves)


def _is_complete(config: Config, progress: Progress, epoch: int) -> bool:
    """Whether a run ends after so many complete epochs."""
    patience = config.early_stop_evaluations
    return (
        epoch >= config.num_epochs
        or 0 < config.max_steps <= progress.step
        or 0 < patience <= progress.evaluations_without_better
    )


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
def _saving_at_a_mistake(run: Run, state: RunState, folder: RunFolder) -> Iterator[None]:
    """Keep what was learned before the memory, say, is too small for a step or a validation."""
    try:
        yield
    except UserError:
        _save_if_possible(run, state, folder)
        raise


def save_last(run: Run, state: RunState, folder: RunFolder) -> None:
    """Write last.ckpt: everything that is needed to continue."""
    if folder.is_first_rank:
        saved = run.describe() | state.state_dict() | {"top_weights": folder.top.state_dict()}
        checkpoint.save_last(folder.path / checkpoint.LAST, saved)


def _save_if_possible(run: Run, state: RunState, folder: RunFolder) -> None:
    warn_if_not_saved(lambda: save_last(run, state, folder))


def _save_surely(run: Run, state: RunState, folder: RunFolder) -> None:
    """Save the last checkpoint of a run.

    Raises:
        UserError: the disk does not take it.
    """

    def save() -> None:
        try:
            save_last(run, state, folder)
        except CheckpointNotSaved as error:
            advice = f"{error.advice}, then go on with --mode train --resume {folder.path}"
            raise UserError(f"{error}; {advice}") from None

    run.ranks.join(save, may_stop=False)


def _save_interrupted(run: Run, state: RunState, folder: RunFolder, reason: Interrupted) -> int:
    """Save where a signal stopped the run, print how to go on, and return the exit code."""
    _save_surely(run, state, folder)
    run.fabric.print(f"stopped at step {state.progress.step}; to go on: --mode train --resume {folder.path}")
    return reason.exit_code
