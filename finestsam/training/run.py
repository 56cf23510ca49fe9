"""Build everything that a run works with, and bring a run that is continued to where it was."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from finestsam.config import (
    CHUNK_OBJECTS,
    AugmentConfig,
    Config,
    ModelConfig,
    PromptsConfig,
    flatten_config,
)
from finestsam.data.dataset import PROMPT_KINDS, SampleDataset, SampleSettings, StepSampler
from finestsam.data.embeddings import EmbeddingStore
from finestsam.data.loaders import build_train_loader, build_validation_loader
from finestsam.data.previous_logits import PreviousLogits
from finestsam.data.read import LabelledSet, describe_dataset, read_training_set
from finestsam.data.report import write_report
from finestsam.data.semantic import ClassTable
from finestsam.download import hash_file
from finestsam.errors import UserError
from finestsam.model.adapt import adapt_
from finestsam.model.fft_attention import list_blocks, mount_fft_attention_
from finestsam.model.load import LoadedModel, load_model
from finestsam.model.sam import FinestSam
from finestsam.prediction.generator import resolve_generator
from finestsam.prediction.precompute import Embedder, fill_store, open_store
from finestsam.training import checkpoint
from finestsam.training.affinity import AffinityHead
from finestsam.training.distill import distill_
from finestsam.training.probe import choose_chunk_objects
from finestsam.training.random_state import random_state, restore_random_state
from finestsam.training.run_folder import create_run_folder
from finestsam.training.schedules import build_optimizer, build_scheduler
from finestsam.training.semantic import SemanticStepper, build_semantic_optimizer, choose_classes
from finestsam.training.step import Stepper
from finestsam.training.trainable import freeze_, trains_encoder


@dataclass
class Progress:
    """How far a run has come: what is saved beside weights, optimizer and scheduler to continue exactly."""

    epoch: int = 0  # complete ones
    batches_done: int = 0  # per rank, of the epoch that runs
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch that runs
    objects: int = 0  # behind the sums
    seconds: float = 0.0  # of the epoch that runs
    skipped_steps: int = 0  # in a row, because their gradient was not finite
    best: list[float] | None = None  # by the metric that was chosen, and of equals by val_per_mask_iou
    floor: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # of the newest validation
    generator: dict[str, Any] = field(default_factory=dict)  # settings that did best in it, for best.json
    evaluations_without_better: int = 0
    chunk_objects: int | None = None
    started_from: str = ""
    started_from_sha256: str | None = None


@dataclass
class Run:
    """What one run works with."""

    config: Config
    fabric: Fabric
    folder: Path
    data: LabelledSet
    loaded: LoadedModel
    stepper: Stepper
    scheduler: torch.optim.lr_scheduler.LRScheduler
    sampler: StepSampler
    train_loader: DataLoader
    val_loader: DataLoader | None  # None: nothing to validate on
    progress: Progress
    top: checkpoint.TopWeights
    classes: ClassTable | None = None  # of the semantic task

    @property
    def has_new_attention(self) -> bool:
        """Whether this run replaced attention of the weights that it started from."""
        return self.config.model_layer.fft_attention.blocks != "none"

    @property
    def is_first_rank(self) -> bool:
        return self.fabric.global_rank == 0


def build_run(fabric: Fabric, config: Config) -> Run:
    """Read the data, build the model, restore a run that is continued."""
    state = checkpoint.load_state(Path(config.resume)) if config.resume else None
    with fabric.rank_zero_first():  # the others find what the first one has kept, and what it has downloaded
        data = read_training_set(config.dataset)
        loaded = _load_weights(fabric, config, state)
    data.drop_vanishing(loaded.model.image_size, config.dataset.min_area_pixels)
    if config.strict:
        data.refuse_defects()
    folder = _prepare_folder(fabric, config, data)
    progress = _restore_progress(state, data) if state else _begin_progress(fabric, loaded)
    originals = SampleDataset(data.train, _choose_sample_settings(config, loaded.model))
    distill_(fabric, loaded, originals, config.model_layer.fft_attention.distill_steps)
    classes = choose_classes(config, loaded, data.category_names) if config.task == "semantic" else None
    stepper, scheduler = _build_stepper(fabric, config, loaded, data, folder)
    progress.sums = progress.sums or dict.fromkeys(stepper.measures, 0.0)
    settings = replace(_choose_sample_settings(config, loaded.model), classes=classes)
    sampler = StepSampler(len(data.train), config.batch_size, settings.seed, fabric.global_rank, fabric.world_size)
    store = stepper.embedder.store
    train_set = SampleDataset(data.train, settings, stepper.previous_logits, store)
    val_set = _build_validation_set(config, data, settings, store)
    if store:
        fill_store(
            stepper.embedder, [train_set, val_set], config.num_workers, fabric.global_rank, fabric.world_size,
            fabric.broadcast,
        )  # fmt: skip
        fabric.barrier()
    stepper.chunk_objects = progress.chunk_objects = _choose_chunk_objects(fabric, config, progress, stepper, train_set)
    val_loader = build_validation_loader(val_set, config.num_workers, fabric.global_rank, fabric.world_size)
    run = Run(
        config, fabric, folder, data, loaded, stepper, scheduler, sampler,
        build_train_loader(train_set, sampler, config.num_workers),
        val_loader if len(val_set) else None,
        progress, checkpoint.TopWeights(folder, config.save_top_k), classes,
    )  # fmt: skip
    if state is not None:
        _restore(run, state)
    return run


def _load_weights(fabric: Fabric, config: Config, state: dict | None) -> LoadedModel:
    """Return the model to start from, or the one that a run was stopped with."""
    if state is None:
        loaded = load_model(config, device=fabric.device)
        loaded.replaced = adapt_(loaded.model.sam, config.model_layer)
        return loaded
    _refuse_other_layers(config, json.loads(state["config"]))
    bare = replace(config, model=ModelConfig(state["model_type"], "none", state["image_size"]))
    loaded = load_model(bare, device=fabric.device)
    mount_fft_attention_(loaded.model.sam, list_blocks(state["model"]))
    adapt_(loaded.model.sam, config.model_layer)
    loaded.model.sam.load_state_dict(state["model"])
    return loaded


def _refuse_other_layers(config: Config, before: dict[str, Any]) -> None:
    """Raise where the settings ask for other layers, or other ones that train, than the run was stopped with."""
    now = flatten_config(config)
    changed = [
        f"{name} {now[name]}, before {before[name]}"
        for name in now
        if name.startswith(
            ("model_layer.freeze.", "model_layer.thaw.", "model_layer.lora.", "model_layer.fft_attention.blocks")
        )
        and name in before
        and now[name] != before[name]
    ]
    if changed:
        raise UserError(f"--resume: {'; '.join(changed)}: a run goes on with what it trained; start a new one")


def _prepare_folder(fabric: Fabric, config: Config, data: LabelledSet) -> Path:
    """Return the run's folder, the same on every rank, with the settings, the report and the split in it."""
    if config.resume:
        if fabric.global_rank == 0:
            checkpoint.remove_stale_files(Path(config.resume))
        return Path(config.resume)
    folder = None
    if fabric.global_rank == 0:
        folder = create_run_folder(Path(config.sav_dir), config.run_name, config.dataset.path)
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        write_report(folder / "dataset_report.json", describe_dataset(data.report, data.train + data.val))
        split = {
            side: [{"id": record.image_id, "file_name": record.file_name} for record in records]
            for side, records in (("train", data.train), ("val", data.val))
        }
        (folder / "split.json").write_text(json.dumps(split, indent=1) + "\n", encoding="utf-8")
    return fabric.broadcast(folder)


def _begin_progress(fabric: Fabric, loaded: LoadedModel) -> Progress:
    digest = hash_file(loaded.path) if loaded.path and fabric.global_rank == 0 else None
    return Progress(started_from=loaded.source, started_from_sha256=fabric.broadcast(digest))


def _restore_progress(state: dict, data: LabelledSet) -> Progress:
    if state["dataset"] != data.fingerprint:
        raise UserError("--resume: the dataset is not the one that the run was trained on; start a new run with it")
    return Progress(**state["progress"])


def _build_stepper(
    fabric: Fabric, config: Config, loaded: LoadedModel, data: LabelledSet, folder: Path
) -> tuple[Stepper, torch.optim.lr_scheduler.LRScheduler]:
    model = loaded.model.train()
    model.sam.image_encoder.recomputes = config.model_layer.recompute_encoder
    freeze_(model, config)
    is_semantic = model.semantic_head is not None
    if config.losses.affinity_ratio > 0 and not is_semantic and trains_encoder(model):
        model.affinity_head = AffinityHead(model.sam.prompt_encoder.embed_dim).to(model.device)
    optimizer = build_semantic_optimizer(loaded, config) if is_semantic else build_optimizer(model, config.opt)
    scheduler = build_scheduler(optimizer, config.sched, config.eval_interval)
    wrapped, optimizer = fabric.setup(model, optimizer)
    # float16 alone overflows; bfloat16 has float32's range.
    scaler = torch.amp.GradScaler(fabric.device.type, enabled=model.encoder_dtype == torch.float16)
    previous = None
    if config.prompts.use_logits and not is_semantic:
        count = sum(len(record.annotations) for record in data.train)
        previous = PreviousLogits(folder / "previous_logits", count, model.image_size // 4)
        if fabric.global_rank == 0:
            previous.create()
        fabric.barrier()
    # What a training encoder answered is out of date with the next step.
    embedder = Embedder(model, None if trains_encoder(model) else open_store(config.store, model))
    kind = SemanticStepper if is_semantic else Stepper
    return kind(fabric, config, model, wrapped, optimizer, scaler, embedder, previous), scheduler


def _choose_chunk_objects(
    fabric: Fabric, config: Config, progress: Progress, stepper: Stepper, train_set: SampleDataset
) -> int:
    """Return how many objects are decoded at a time: the same on every rank, and as before in a run that continues."""
    given = config.chunk_objects or progress.chunk_objects
    if stepper.model.semantic_head is not None:
        return given or CHUNK_OBJECTS  # no object is decoded
    if given:
        return given
    return fabric.broadcast(choose_chunk_objects(stepper, train_set) if fabric.global_rank == 0 else None)


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
        wants_cells=model.affinity_head is not None,
    )


def _build_validation_set(
    config: Config, data: LabelledSet, settings: SampleSettings, store: EmbeddingStore | None
) -> SampleDataset:
    records = [record for record in data.val if record.annotations or settings.classes]
    # All objects, pictures and boxes as they are: what is measured must not depend on the noise of training.
    plain = replace(
        settings,
        max_objects=0,
        dataset=replace(config.dataset, background_points=0),
        prompts=replace(_choose_validated(config.prompts), box_jitter_ratio=0.0),
        augment=AugmentConfig(),
        wants_cells=False,
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
        "affinity_head": model.affinity_head.state_dict() if model.affinity_head else None,
        "optimizer": run.stepper.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.stepper.scaler.state_dict(),
        "progress": dataclasses.asdict(run.progress),
        "top": run.top.state_dict(),
        "random": random_state(),
        "config": json.dumps(flatten_config(run.config)),
        "dataset": run.data.fingerprint,
    }
    checkpoint.save_last(run.folder / checkpoint.LAST, state)


def _restore(run: Run, state: dict) -> None:
    if run.loaded.model.semantic_head:
        run.loaded.model.semantic_head.load_state_dict(state["semantic_head"])
    if run.loaded.model.affinity_head:
        run.loaded.model.affinity_head.load_state_dict(state["affinity_head"])
    run.stepper.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    if run.stepper.scaler.is_enabled():
        run.stepper.scaler.load_state_dict(state["scaler"])
    run.top.load_state_dict(state["top"])
    restore_random_state(state["random"])
