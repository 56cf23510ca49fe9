"""Build everything that a run works with, and bring a run that is continued to where it was."""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from finestsam.config import (
    AugmentConfig,
    Config,
    ModelConfig,
    PromptsConfig,
    flatten_config,
)
from finestsam.data.dataset import PROMPT_KINDS, SampleDataset, SampleSettings, StepSampler
from finestsam.data.fingerprint import SPLIT, hash_fingerprint, take_fingerprint
from finestsam.data.loaders import build_train_loader, build_validation_loader, end_workers
from finestsam.data.previous_logits import PreviousLogits
from finestsam.data.read import LabelledSet, describe_dataset, read_training_set
from finestsam.data.semantic import ClassTable
from finestsam.errors import VALUE_ERRORS, UserError
from finestsam.model.adapter import adapt_
from finestsam.model.embeddings import EmbeddingStore
from finestsam.model.load import LoadedModel, load_model, load_weights_
from finestsam.model.sam import FinestSam
from finestsam.prediction.embedder import Embedder, encode_missing, find_missing, open_store
from finestsam.prediction.generator import resolve_generator
from finestsam.records import write_report
from finestsam.runtime.download import hash_file
from finestsam.runtime.ranks import Ranks
from finestsam.runtime.value_types import fits
from finestsam.runtime.whole_files import remove_unfinished, write_json, write_text
from finestsam.training import checkpoint
from finestsam.training.classes import ClassStepper, choose_categories, weigh_classes
from finestsam.training.cost import describe_cost
from finestsam.training.distill import distill_
from finestsam.training.optim import build_optimizer, build_scheduler
from finestsam.training.probe import choose_chunk_objects, find_free_bytes, measure_need
from finestsam.training.random_state import random_state, restore_random_state
from finestsam.training.resume import check_settings, convert_batches, load_state, refuse_other_dataset
from finestsam.training.run_folder import create_run_folder, lock_run, take_up_run
from finestsam.training.semantic import SemanticStepper, choose_classes
from finestsam.training.step import Stepper
from finestsam.training.time_budget import TimeBudget
from finestsam.training.trainable import decodes_masks, freeze_, trains_encoder

DIVIDES_OTHERWISE = (
    "--resume: the run was begun by a version of finestsam that divides the weights otherwise; go on with that "
    "version, or start a new run from best.pth"
)


@dataclass
class Progress:
    """How far a run has come: what is saved beside weights, optimizer and scheduler to continue exactly."""

    epoch: int = 0  # complete ones
    batches_done: int = 0  # per rank, of the epoch that runs
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch that runs
    objects: int = 0  # behind the sums
    seconds: float = 0.0  # of the epoch that runs, without its validation
    validation_seconds: float = 0.0  # of the newest validation
    skipped_steps: int = 0  # in a row, because loss or gradient was not finite
    all_skipped_steps: int = 0  # of the run
    best: dict[str, float] | None = None  # the figures of the best weights
    is_blended: bool = False  # whether putting original weights back into these best ones has been tried
    baseline: dict[str, float] = field(default_factory=dict)
    baseline_generator: dict[str, Any] = field(default_factory=dict)  # thresholds that did best for the baseline
    metrics: dict[str, float] = field(default_factory=dict)  # of the newest validation
    generator: dict[str, Any] = field(default_factory=dict)  # settings that did best in it, for best.json
    tuned_on: int = 0  # images that they were chosen on
    evaluations_without_better: int = 0
    lost_best: str = ""  # why best.pth does not hold the best weights
    chunk_objects: int | None = None
    started_from: str = ""
    started_from_sha256: str | None = None


@dataclass
class Run:
    """What one run works with."""

    config: Config
    fabric: Fabric
    ranks: Ranks
    folder: Path
    lock: FileLock | None  # of the folder, which the first rank holds while the run lasts
    data: LabelledSet
    fingerprint: str  # of the data
    loaded: LoadedModel
    stepper: Stepper
    scheduler: torch.optim.lr_scheduler.LRScheduler
    sampler: StepSampler
    train_loader: DataLoader
    val_loader: DataLoader | None  # None: nothing to validate on
    progress: Progress
    top: checkpoint.TopWeights
    classes: ClassTable | None = None  # of the tasks semantic and classes
    cost: list[str] = field(default_factory=list)  # of a step, for the screen
    saving: TimeBudget = field(default_factory=TimeBudget)  # of last.ckpt
    drawing: TimeBudget = field(default_factory=TimeBudget)  # of the curves

    @property
    def has_new_attention(self) -> bool:
        """Whether this run replaced attention of the weights that it started from."""
        return self.config.model_layer.fft_attention.blocks != "none"

    @property
    def is_semantic(self) -> bool:
        return self.config.task == "semantic"

    @property
    def is_first_rank(self) -> bool:
        return self.fabric.global_rank == 0

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        end_workers(self.train_loader)
        if self.lock:
            self.lock.release()


def build_run(fabric: Fabric, ranks: Ranks, config: Config, stepper_kind: type[Stepper] | None = None) -> Run:
    """Read the data, build the model, restore a run that is continued.

    Args:
        stepper_kind: takes the steps; None: that of the task.

    Raises:
        Interrupted: a signal came; there is nothing to save yet.
        UserError: the settings, the data or the checkpoint cannot be used.
    """
    lock = ranks.join(lambda: take_up_run(Path(config.resume)) if config.resume and ranks.rank == 0 else None)
    state = ranks.join(lambda: _load_state(config, ranks))
    # The others find what the first one has kept, and what it has downloaded.
    data, loaded = ranks.join_after_first(lambda: _load_data_and_weights(fabric, config, state))
    fingerprint = take_fingerprint(data)
    if state is not None:
        ranks.join(lambda: refuse_other_dataset(Path(config.resume), state, fingerprint))
    if not config.resume:
        folder, lock = ranks.join(lambda: _create_folder(config) if ranks.rank == 0 else (None, None))
    folder = Path(config.resume) if config.resume else fabric.broadcast(folder)
    if state is None and ranks.rank == 0:
        _describe(folder, config, data, fingerprint)
    progress = _restore_progress(state, config, ranks) if state else _begin_progress(fabric, loaded)
    originals = SampleDataset(data.train, _choose_sample_settings(config, loaded.model))
    ranks.join(lambda: distill_(fabric, loaded, originals, config.model_layer.fft_attention.distill_steps))
    classes = _choose_classes(config, loaded, data, state)
    stepper_kind = stepper_kind or _choose_stepper(loaded.model, classes)
    stepper, scheduler = _build_stepper(fabric, config, loaded, data, folder, stepper_kind)
    if isinstance(stepper, ClassStepper):
        stepper.class_weights = weigh_classes(data.train, classes)
    progress.sums = progress.sums or dict.fromkeys(stepper.measures, 0.0)
    kind = {"semantic": "classes", "classes": "categories"}.get(config.task)
    settings = _choose_sample_settings(config, loaded.model)
    settings = replace(settings, **{kind: classes}) if kind else settings
    sampler = StepSampler(len(data.train), config.batch_size, settings.seed, fabric.global_rank, fabric.world_size)
    store = stepper.embedder.store
    train_set = SampleDataset(data.train, settings, stepper.previous_logits, store)
    val_set = _build_validation_set(config, data, settings, store)
    if store:
        _fill_store(ranks, stepper.embedder, [train_set, val_set], config.num_workers)
    chunk_objects, cost = ranks.gather(lambda: _probe(config, progress, stepper, train_set, ranks))[0]
    stepper.chunk_objects = progress.chunk_objects = chunk_objects
    val_loader = build_validation_loader(val_set, config.num_workers, fabric.global_rank, fabric.world_size)
    run = Run(
        config, fabric, ranks, folder, lock, data, hash_fingerprint(fingerprint), loaded, stepper, scheduler, sampler,
        build_train_loader(train_set, sampler, config.num_workers),
        val_loader if len(val_set) else None,
        progress, checkpoint.TopWeights(folder, config.save_top_k), classes, cost,
    )  # fmt: skip
    if state is not None:
        ranks.join(lambda: _restore(run, state))
    return run


def _choose_classes(config: Config, loaded: LoadedModel, data: LabelledSet, state: dict | None) -> ClassTable | None:
    """Return the classes of the task, and give the model a head for them; None where it has none."""
    names = state.get("categories") if state else None
    if config.task == "semantic":
        return choose_classes(config, loaded, data.category_names, names)
    return choose_categories(loaded, data.category_names, names) if config.task == "classes" else None


def _load_state(config: Config, ranks: Ranks) -> dict | None:
    """Return the checkpoint to continue from, compared with the settings; None for a run that begins."""
    if not config.resume:
        return None
    folder = Path(config.resume)
    if ranks.rank == 0:
        remove_unfinished(folder)
    state = load_state(folder, Progress)
    if state is None and ranks.rank == 0:
        print(f"warning: {folder} was stopped before its first checkpoint: the run begins again", file=sys.stderr)
    if state is not None and ranks.rank == 0:
        check_settings(config, state, config.batch_size * ranks.count)
    return state


def _load_data_and_weights(fabric: Fabric, config: Config, state: dict | None) -> tuple[LabelledSet, LoadedModel]:
    data = read_training_set(config.dataset)
    loaded = _load_weights(fabric, config, state)
    data.drop_vanishing(loaded.model.image_size)
    if config.strict:
        data.refuse_defects()
    return data, loaded


def _load_weights(fabric: Fabric, config: Config, state: dict | None) -> LoadedModel:
    """Return the model to start from, or the one that a run was stopped with."""
    if state is None:
        loaded = load_model(config, device=fabric.device)
        loaded.replaced = adapt_(loaded.model.sam, config.model_layer)
        return loaded
    bare = replace(config, model=ModelConfig(state["model_type"], "none", state["image_size"]))
    loaded = load_model(bare, device=fabric.device)
    adapt_(loaded.model.sam, config.model_layer)
    try:
        load_weights_(loaded.model.sam, state["model"])
    except (RuntimeError, *VALUE_ERRORS):
        raise UserError(DIVIDES_OTHERWISE) from None
    return loaded


def _create_folder(config: Config) -> tuple[Path, FileLock | None]:
    """Return the folder of a new run, and its lock."""
    folder = create_run_folder(Path(config.sav_dir), config.run_name, config.dataset.path)
    return folder, lock_run(folder)


def _describe(folder: Path, config: Config, data: LabelledSet, fingerprint: dict[str, Any]) -> None:
    """Write the settings of a run that begins, then the report and the split.

    A run that is killed meanwhile can be continued from the first on.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    write_report(folder / "dataset_report.json", describe_dataset(data.report, data.train + data.val))
    write_json(folder / SPLIT, fingerprint, indent=1)


def _begin_progress(fabric: Fabric, loaded: LoadedModel) -> Progress:
    digest = hash_file(loaded.path) if loaded.path and fabric.global_rank == 0 else None
    return Progress(started_from=loaded.source, started_from_sha256=fabric.broadcast(digest))


def _restore_progress(state: dict, config: Config, ranks: Ranks) -> Progress:
    progress = Progress(**state["progress"])
    now = config.batch_size * ranks.count
    progress.batches_done = convert_batches(progress.batches_done, state.get("images_per_batch", now), now)
    return progress


def _fill_store(ranks: Ranks, embedder: Embedder, datasets: list[SampleDataset], num_workers: int) -> None:
    """Encode what the store lacks, each rank its share."""
    missing = ranks.gather(lambda: find_missing(embedder.store, datasets) if ranks.rank == 0 else [])[0]
    mine = missing[ranks.rank :: ranks.count]
    ranks.join(lambda: encode_missing(embedder, datasets, mine, num_workers, is_quiet=ranks.rank > 0))


def _build_stepper(
    fabric: Fabric, config: Config, loaded: LoadedModel, data: LabelledSet, folder: Path, stepper_kind: type[Stepper]
) -> tuple[Stepper, torch.optim.lr_scheduler.LRScheduler]:
    model = loaded.model.train()
    model.sam.image_encoder.recomputes = config.model_layer.recompute_encoder
    freeze_(model, config)
    if head := stepper_kind.build_training_head(model):
        model.training_head = head.to(model.device)
    # One pass over the weights in place of ten.
    optimizer = build_optimizer(model, config.opt, fused=fabric.device.type in ("cpu", "cuda"))
    total_steps = count_steps(config, len(data.train), fabric.world_size)
    scheduler = build_scheduler(optimizer, config.sched, config.eval_interval, total_steps)
    # It brings the first rank's weights to the others. What it returns would also add up gradients while they are
    # taken; a step does that afterwards, when every rank has its own.
    _, optimizer = fabric.setup(model, optimizer)
    # float16 alone overflows; bfloat16 has float32's range.
    scaler = torch.amp.GradScaler(fabric.device.type, enabled=model.encoder_dtype == torch.float16)
    previous = None
    if config.prompts.use_logits and decodes_masks(model):
        count = sum(len(record.annotations) for record in data.train)
        previous = PreviousLogits(folder / "previous_logits", count, model.image_size // 4)
        if fabric.global_rank == 0:
            previous.create()
        fabric.barrier()
    # What a training encoder answered is out of date with the next step.
    embedder = Embedder(model, None if trains_encoder(model) else open_store(config.store, model), rounds=True)
    return stepper_kind(fabric, config, model, optimizer, scaler, embedder, previous), scheduler


def _choose_stepper(model: FinestSam, classes: ClassTable | None) -> type[Stepper]:
    if not decodes_masks(model):
        return SemanticStepper
    return ClassStepper if classes else Stepper


def count_steps(config: Config, images: int, world_size: int) -> int:
    """Return the optimizer steps of a run that nothing stops early, where each has an object."""
    batches = math.ceil(images / (config.batch_size * world_size))
    steps = config.num_epochs * math.ceil(batches / config.opt.accumulate_batches)
    return min(steps, config.max_steps) if config.max_steps else steps


def _probe(
    config: Config, progress: Progress, stepper: Stepper, train_set: SampleDataset, ranks: Ranks
) -> tuple[int, list[str]] | None:
    """Return how many objects are decoded at a time, and what a step costs; a run that continues knows both.

    The first rank tries it for all.
    """
    if ranks.rank > 0:
        return None
    if progress.chunk_objects:
        return config.chunk_objects or progress.chunk_objects, []
    need = measure_need(stepper, train_set)
    chunk_objects = config.chunk_objects
    if not decodes_masks(stepper.model):
        chunk_objects = 1
    elif chunk_objects is None:
        chunk_objects = choose_chunk_objects(stepper, need)
    return chunk_objects, describe_cost(stepper, need, chunk_objects, find_free_bytes(stepper.model.device))


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
        wants_cells=model.training_head is not None,
    )


def _build_validation_set(
    config: Config, data: LabelledSet, settings: SampleSettings, store: EmbeddingStore | None
) -> SampleDataset:
    records = [record for record in data.val if record.annotations or settings.classes]
    # All objects, images and boxes as they are: what is measured must not depend on the noise of training.
    plain = replace(
        settings,
        max_objects=0,
        dataset=replace(config.dataset, background_points=0, prompts_per_object=1),
        prompts=_choose_validated(config.prompts),
        jitters_boxes=False,
        augment=AugmentConfig(),
        wants_cells=False,
        categories=None,
    )
    return SampleDataset(records, plain, store=store)


def _choose_validated(prompts: PromptsConfig) -> PromptsConfig:
    """Return what validation asks with: of mixed kinds the first, points where they are among them."""
    if not prompts.mix:
        return prompts
    first = next(kind for kind in PROMPT_KINDS if getattr(prompts, kind))
    return replace(prompts, mix=False, **{kind: kind == first for kind in PROMPT_KINDS})


def save_last(run: Run) -> None:
    """Write last.ckpt: everything that is needed to continue."""
    if not run.is_first_rank:
        return
    model = run.loaded.model
    state = {
        "model_type": run.loaded.model_type,
        "image_size": model.image_size,
        "model": model.sam.state_dict(),
        "semantic_head": model.semantic_head.state_dict() if model.semantic_head else None,
        "class_head": model.class_head.state_dict() if model.class_head else None,
        "categories": run.classes.names[1:] if run.classes else None,  # in the order of their head
        "training_head": model.training_head.state_dict() if model.training_head else None,
        "optimizer": run.stepper.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.stepper.scaler.state_dict(),
        "progress": dataclasses.asdict(run.progress),
        "top_weights": run.top.state_dict(),
        "random": random_state(),
        "config": json.dumps(flatten_config(run.config), allow_nan=False),
        "dataset": run.fingerprint,
        "images_per_batch": run.config.batch_size * run.ranks.count,
    }
    checkpoint.save_last(run.folder / checkpoint.LAST, state)


def _restore(run: Run, state: dict) -> None:
    try:
        for name in ("semantic_head", "class_head", "training_head"):
            if head := getattr(run.loaded.model, name):
                head.load_state_dict(state[name])
        run.stepper.optimizer.load_state_dict(state["optimizer"])
        _check_moments(run.stepper.optimizer)
        run.scheduler.load_state_dict(state["scheduler"])
        if run.stepper.scaler.is_enabled():
            run.stepper.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, *VALUE_ERRORS):
        raise UserError(DIVIDES_OTHERWISE) from None
    # An earlier version kept less of these weights: what their names say ranks them.
    top = state.get("top_weights", {})
    run.top.load_state_dict(top if fits(top, dict[str, dict[str, float]], finite=False) else {})
    restore_random_state(state["random"])


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError unless what an optimizer remembers of each weight has the weight's shape."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            for name, value in optimizer.state.get(weight, {}).items():
                if name != "step" and value.shape != weight.shape:
                    raise ValueError(f"{name} has the shape {list(value.shape)}, its weight {list(weight.shape)}")
