"""Build everything that a run works with, and bring a run that is continued to where it was."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.fabric import Fabric

from finestsam.config import AugmentConfig, Config, ModelConfig, PromptsConfig
from finestsam.data.dataset import PROMPT_KINDS, SampleDataset, SampleSettings, StepSampler
from finestsam.data.fingerprint import hash_fingerprint, take_fingerprint
from finestsam.data.loaders import build_train_loader, build_validation_loader
from finestsam.data.previous_logits import PreviousLogits
from finestsam.data.read import LabelledSet, read_training_set
from finestsam.errors import VALUE_ERRORS, UserError
from finestsam.model.adapter import adapt_
from finestsam.model.embeddings import EmbeddingStore
from finestsam.model.heads import is_kept
from finestsam.model.load import LoadedModel, load_model, load_weights_
from finestsam.model.sam import FinestSam
from finestsam.prediction.embedder import Embedder, encode_missing, find_missing, open_store
from finestsam.prediction.generator import resolve_generator
from finestsam.runtime.download import hash_file
from finestsam.runtime.ranks import Ranks
from finestsam.runtime.value_types import fits
from finestsam.runtime.whole_files import remove_unfinished
from finestsam.tasks.base import Task
from finestsam.training.checkpoint import TopWeights
from finestsam.training.cost import describe_cost
from finestsam.training.distill import distill_
from finestsam.training.optim import build_optimizer, build_scheduler
from finestsam.training.probe import choose_chunk_objects, find_free_bytes, measure_need
from finestsam.training.resume import check_settings, convert_batches, load_state, refuse_other_dataset
from finestsam.training.run import Run
from finestsam.training.run_folder import RunFolder, create_run_folder, lock_run, take_up_run
from finestsam.training.state import Progress, RunState
from finestsam.training.step import Stepper
from finestsam.training.trainable import freeze_, trains_encoder

DIVIDES_OTHERWISE = (
    "--resume: the run was begun by a version of finestsam that divides the weights otherwise; go on with that "
    "version, or start a new run from best.pth"
)


def set_up(fabric: Fabric, ranks: Ranks, config: Config, kind: type[Task]) -> tuple[Run, RunState, RunFolder]:
    """Read the data, build the model, restore a run that is continued.

    Args:
        kind: what is trained.

    Raises:
        Interrupted: a signal came; there is nothing to save yet.
        UserError: the settings, the data or the checkpoint cannot be used.
    """
    given = _read_given(fabric, ranks, config)
    task = _build_task(fabric, ranks, kind(config, given.loaded.model), given)
    state = _build_state(fabric, ranks, task, given)
    run = _build_run(fabric, ranks, task, state, given)
    if given.saved is not None:
        ranks.join(lambda: _restore(state, given))
    return run, state, given.folder


@dataclass(frozen=True)
class _Given:
    """What a run begins or goes on with.

    Attributes:
        saved: the checkpoint of a run that is continued; None: it begins.
        fingerprint: hash of the data's.
    """

    saved: dict[str, Any] | None
    data: LabelledSet
    fingerprint: str
    loaded: LoadedModel
    folder: RunFolder


def _read_given(fabric: Fabric, ranks: Ranks, config: Config) -> _Given:
    """Read checkpoint, data and weights, then open the folder: a mistake in them leaves none behind."""
    is_first, resumed = ranks.rank == 0, Path(config.resume) if config.resume else None
    lock = ranks.join(lambda: take_up_run(resumed) if resumed and is_first else None)
    saved = ranks.join(lambda: _read_saved(config, ranks))
    # The others find what the first one has kept, and what it has downloaded.
    data, loaded = ranks.join_after_first(lambda: _load_data_and_weights(fabric, config, saved))
    fingerprint = take_fingerprint(data)
    if saved is not None:
        ranks.join(lambda: refuse_other_dataset(resumed, saved, fingerprint))
    path = resumed
    if resumed is None:
        path, lock = ranks.join(lambda: _create_folder(config) if is_first else (None, None))
        path = fabric.broadcast(path)
    folder = RunFolder(path, lock, TopWeights(path, config.save_top_k), is_first)
    if saved is None:
        folder.describe(config, data, fingerprint)
    return _Given(saved, data, hash_fingerprint(fingerprint), loaded, folder)


def _read_saved(config: Config, ranks: Ranks) -> dict[str, Any] | None:
    """Return the checkpoint to continue from, compared with the settings; None for a run that begins."""
    if not config.resume:
        return None
    folder = Path(config.resume)
    if ranks.rank == 0:
        remove_unfinished(folder)
    saved = load_state(folder, Progress)
    if saved is None and ranks.rank == 0:
        print(f"warning: {folder} was stopped before its first checkpoint: the run begins again", file=sys.stderr)
    if saved is not None and ranks.rank == 0:
        check_settings(config, saved, config.batch_size * ranks.count)
    return saved


def _load_data_and_weights(
    fabric: Fabric, config: Config, saved: dict[str, Any] | None
) -> tuple[LabelledSet, LoadedModel]:
    data = read_training_set(config.dataset)
    loaded = _load_weights(fabric, config, saved)
    data.drop_vanishing(loaded.model.image_size)
    if config.strict:
        data.refuse_defects()
    return data, loaded


def _load_weights(fabric: Fabric, config: Config, saved: dict[str, Any] | None) -> LoadedModel:
    """Return the model to start from, or the one that a run was stopped with."""
    if saved is None:
        loaded = load_model(config, device=fabric.device)
        loaded.replaced = adapt_(loaded.model.sam, config.model_layer)
        return loaded
    bare = replace(config, model=ModelConfig(saved["model_type"], "none", saved["image_size"]))
    loaded = load_model(bare, device=fabric.device)
    adapt_(loaded.model.sam, config.model_layer)
    try:
        load_weights_(loaded.model.sam, saved["model"])
    except (RuntimeError, *VALUE_ERRORS):
        raise UserError(DIVIDES_OTHERWISE) from None
    return loaded


def _create_folder(config: Config) -> tuple[Path, FileLock | None]:
    """Return the folder of a new run, and its lock."""
    folder = create_run_folder(Path(config.sav_dir), config.run_name, config.dataset.path)
    return folder, lock_run(folder)


def _build_task(fabric: Fabric, ranks: Ranks, task: Task, given: _Given) -> Task:
    """Make the model ready for the task: what replaces its attention, and the head."""
    config, loaded = task.config, given.loaded
    originals = SampleDataset(given.data.train, _choose_sample_settings(config, loaded.model))
    ranks.join(lambda: distill_(fabric, loaded, originals, config.model_layer.fft_attention.distill_steps))
    task.begin_training(loaded, given.data, given.saved.get("categories") if given.saved else None)
    kept = [head.SUFFIX for head in loaded.model.heads.values() if is_kept(head)]
    given.folder.top.suffixes = (".json", *kept)
    return task


def _build_state(fabric: Fabric, ranks: Ranks, task: Task, given: _Given) -> RunState:
    """Choose what trains, and build what changes with it."""
    config, model = task.config, task.model.train()
    model.sam.image_encoder.recomputes = config.model_layer.recompute_encoder
    freeze_(model, config, task.decodes_masks)
    # One pass over the weights in place of ten.
    optimizer = build_optimizer(model, config.opt, fused=fabric.device.type in ("cpu", "cuda"))
    steps = count_steps(config, len(given.data.train), fabric.world_size)
    scheduler = build_scheduler(optimizer, config.sched, config.eval_interval, *steps)
    # It brings the first rank's weights to the others. What it returns would also add up gradients while they are
    # taken; a step does that afterwards, when every rank has its own.
    _, optimizer = fabric.setup(model, optimizer)
    # float16 alone overflows; bfloat16 has float32's range.
    scaler = torch.amp.GradScaler(fabric.device.type, enabled=model.encoder_dtype == torch.float16)
    saved = given.saved
    progress = _restore_progress(saved, config, ranks) if saved else _begin_progress(fabric, given.loaded)
    progress.sums = progress.sums or dict.fromkeys(task.measures, 0.0)
    return RunState(model, optimizer, scheduler, scaler, progress)


def count_steps(config: Config, images: int, world_size: int) -> tuple[int, int]:
    """Return the optimizer steps of a run, which max_steps may end, and of all its epochs; nothing else stops it."""
    batches = math.ceil(images / (config.batch_size * world_size))
    steps = config.num_epochs * math.ceil(batches / config.opt.accumulate_batches)
    return min(steps, config.max_steps or steps), steps


def _begin_progress(fabric: Fabric, loaded: LoadedModel) -> Progress:
    digest = hash_file(loaded.path) if loaded.path and fabric.global_rank == 0 else None
    return Progress(started_from=loaded.source, started_from_sha256=fabric.broadcast(digest))


def _restore_progress(saved: dict[str, Any], config: Config, ranks: Ranks) -> Progress:
    progress = Progress(**saved["progress"])
    now = config.batch_size * ranks.count
    progress.batches_done = convert_batches(progress.batches_done, saved.get("images_per_batch", now), now)
    return progress


def _build_run(fabric: Fabric, ranks: Ranks, task: Task, state: RunState, given: _Given) -> Run:
    """Build what takes the steps and what feeds it, encode what a frozen encoder computes, and try a step."""
    config, data = task.config, given.data
    samples = _choose_sample_settings(config, task.model)
    stepper = _build_stepper(fabric, task, state, given)
    store = stepper.embedder.store
    train_set = SampleDataset(data.train, task.choose_targets(samples), stepper.previous_logits, store)
    val_set = _build_validation_set(task, data, samples, store)
    if store:
        _fill_store(ranks, stepper.embedder, [train_set, val_set], config.num_workers)
    chunk_objects, cost = ranks.gather(lambda: _probe(stepper, state.progress, train_set, ranks))[0]
    stepper.chunk_objects = state.progress.chunk_objects = chunk_objects
    sampler = StepSampler(len(data.train), config.batch_size, samples.seed, fabric.global_rank, fabric.world_size)
    train_loader = build_train_loader(train_set, sampler, config.num_workers)
    val_loader = build_validation_loader(val_set, config.num_workers, fabric.global_rank, fabric.world_size)
    return Run(
        config, fabric, ranks, data, given.fingerprint, given.loaded, task, stepper, sampler, train_loader,
        val_loader if len(val_set) else None, cost,
    )  # fmt: skip


def _build_stepper(fabric: Fabric, task: Task, state: RunState, given: _Given) -> Stepper:
    config, model, previous = task.config, task.model, None
    if config.prompts.use_logits and task.decodes_masks:
        count = sum(len(record.annotations) for record in given.data.train)
        previous = PreviousLogits(given.folder.path / "previous_logits", count, model.image_size // 4)
        if fabric.global_rank == 0:
            previous.create()
        fabric.barrier()
    # What a training encoder computed is out of date with the next step.
    embedder = Embedder(model, None if trains_encoder(model) else open_store(config.store, model), rounds=True)
    return Stepper(fabric, task, state.optimizer, state.scaler, embedder, previous)


def _choose_sample_settings(config: Config, model: FinestSam) -> SampleSettings:
    seed = config.seed_device if config.seed_dataloader is None else config.seed_dataloader
    points_per_side = resolve_generator(config.generator, card=None).points_per_side
    return SampleSettings(
        model.image_size,
        points_per_side,
        seed,
        config.prompts,
        config.dataset,
        config.dataset.max_objects,
        config.augment,
    )


def _build_validation_set(
    task: Task, data: LabelledSet, samples: SampleSettings, store: EmbeddingStore | None
) -> SampleDataset:
    config = task.config
    # All objects, images and boxes as they are: what is measured must not depend on the noise of training.
    plain = replace(
        samples,
        max_objects=0,
        dataset=replace(config.dataset, background_points=0, prompts_per_object=1),
        prompts=_choose_validated(config.prompts),
        jitters_boxes=False,
        augment=AugmentConfig(),
    )
    settings = task.choose_validation_targets(plain)
    records = [record for record in data.val if record.annotations or not settings.prompts_objects]
    return SampleDataset(records, settings, store=store)


def _choose_validated(prompts: PromptsConfig) -> PromptsConfig:
    """Return what validation prompts with: of mixed kinds the first, points where they are among them."""
    if not prompts.mix:
        return prompts
    first = next(kind for kind in PROMPT_KINDS if getattr(prompts, kind))
    return replace(prompts, mix=False, **{kind: kind == first for kind in PROMPT_KINDS})


def _fill_store(ranks: Ranks, embedder: Embedder, datasets: list[SampleDataset], num_workers: int) -> None:
    """Encode what the store lacks, each rank its share."""
    missing = ranks.gather(lambda: find_missing(embedder.store, datasets) if ranks.rank == 0 else [])[0]
    mine = missing[ranks.rank :: ranks.count]
    ranks.join(lambda: encode_missing(embedder, datasets, mine, num_workers, is_quiet=ranks.rank > 0))


def _probe(
    stepper: Stepper, progress: Progress, train_set: SampleDataset, ranks: Ranks
) -> tuple[int, list[str]] | None:
    """Return how many objects are decoded at a time, and what a step costs; a run that continues knows both.

    The first rank tries it for all.
    """
    if ranks.rank > 0:
        return None
    chunk_objects = stepper.config.chunk_objects
    if progress.chunk_objects:
        return chunk_objects or progress.chunk_objects, []
    need = measure_need(stepper, train_set)
    if not stepper.task.decodes_masks:
        chunk_objects = 1
    elif chunk_objects is None:
        chunk_objects = choose_chunk_objects(stepper, need)
    return chunk_objects, describe_cost(stepper, need, chunk_objects, find_free_bytes(stepper.model.device))


def _restore(state: RunState, given: _Given) -> None:
    try:
        state.load_state_dict(given.saved)
    except (RuntimeError, *VALUE_ERRORS):
        raise UserError(DIVIDES_OTHERWISE) from None
    # An earlier version kept less of these weights: what their names say ranks them.
    top = given.saved.get("top_weights", {})
    given.folder.top.load_state_dict(top if fits(top, dict[str, dict[str, float]], finite=False) else {})
