"""What is said of memory and time before the first step, against what a step takes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from finestsam.config import DatasetConfig, build_config
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.read import read_training_set
from finestsam.data.semantic import number_classes
from finestsam.model.architectures import build_sam
from finestsam.model.heads import SemanticHead
from finestsam.model.sam import FinestSam
from finestsam.prediction.embedder import Embedder
from finestsam.tasks.base import Task
from finestsam.tasks.masks import MasksTask
from finestsam.tasks.semantic import SemanticTask
from finestsam.training.cost import describe_cost
from finestsam.training.optim import build_optimizer
from finestsam.training.probe import USABLE_SHARE, MemoryNeed, measure_need
from finestsam.training.step import Stepper
from finestsam.training.trainable import freeze_

ROOT = Path(__file__).parents[2]
TRAINS_ENCODER = {"model_layer.freeze.image_encoder": False}
STEP = """
import sys
sys.path[:0] = {paths!r}
from finestsam.data.dataset import collate
from test_cost import build_stepper, read_bytes, read_dataset

stepper = build_stepper("vit_tiny")
dataset = read_dataset({scenes!r}, 768)
batch, _ = collate([dataset[(0, 0)]])
before = read_bytes("VmRSS")
stepper.step([batch], 0, False)
print(read_bytes("VmHWM") - before)
"""


def build_stepper(model_type: str, values: dict | None = None, kind: type[Task] = MasksTask) -> Stepper:
    config = build_config(TRAINS_ENCODER if values is None else values)
    model = FinestSam(build_sam(model_type)).train()
    freeze_(model, config)
    model.sam.image_encoder.recomputes = config.model_layer.recompute_encoder
    fabric = Fabric(accelerator="cpu", devices=1)
    _, optimizer = fabric.setup(model, build_optimizer(model, config.opt))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Stepper(fabric, kind(config, model), optimizer, scaler, Embedder(model))


def read_dataset(scenes: str | Path, image_size: int) -> SampleDataset:
    records = read_training_set(DatasetConfig(path=str(scenes), val_size=0.0, use_cache=False)).train[:1]
    config = build_config({})
    return SampleDataset(records, SampleSettings(image_size, 16, 0, config.prompts, config.dataset))


def read_bytes(name: str) -> int:
    """Return a line of this process's status; its peak of `getrusage` would be that of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow  # at the size of the built-in weights: in the smallest model the memory of a step is nothing
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures as Linux does")
def test_the_estimate_is_within_a_factor_of_two_of_what_a_step_takes(scenes):
    script = STEP.format(paths=[str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)], scenes=str(scenes))
    taken = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=True)
    measured = int(taken.stdout.split()[-1])
    stepper, dataset = build_stepper("vit_tiny"), read_dataset(scenes, 768)

    need = measure_need(stepper, dataset)

    estimate = need.fixed_bytes + min(stepper.chunk_objects, len(need.sample)) * need.object_bytes
    assert 0.5 < estimate / measured < 2
    assert need.encoder_bytes > 50e6 and need.training_bytes == 12 * sum(
        weight.numel() for weight in stepper.model.parameters() if weight.requires_grad
    )


@pytest.fixture
def tiny_need(scenes) -> tuple[Stepper, MemoryNeed]:
    stepper = build_stepper("vit_tiny_test")
    return stepper, measure_need(stepper, read_dataset(scenes, 64))


def test_memory_and_time_are_said_in_parts_that_add_up(tiny_need):
    stepper, need = tiny_need

    (line,) = describe_cost(stepper, need, 2, None)

    total = need.fixed_bytes + 2 * need.object_bytes
    assert f"about {total / 1e6:.0f} MB of memory beside 1 MB of weights" in line
    for name in ("gradients and optimizer", "image encoder", "decoder and losses"):
        assert name in line
    assert need.seconds > 0 and f"{need.seconds:.2g} s" in line
    assert "are free" not in line


def test_where_memory_is_tight_the_settings_that_need_less_are_named(tiny_need):
    stepper, need = tiny_need
    total = need.fixed_bytes + 16 * need.object_bytes

    lines = describe_cost(stepper, need, 16, int(1.1 * total))

    assert "are free" in lines[0]
    assert lines[1].startswith("memory is tight")
    for setting in ("lora.rank", "recompute_encoder", "chunk_objects", "resolution low"):
        assert setting in lines[1]


def test_where_there_is_room_a_frozen_encoder_could_train_in_part_or_whole(scenes):
    stepper = build_stepper("vit_tiny_test", {})
    need = measure_need(stepper, read_dataset(scenes, 64))
    total = need.fixed_bytes + need.object_bytes
    assert need.encoder_bytes == 0

    said = [describe_cost(stepper, need, 1, int((total + spare) / USABLE_SHARE))[1:] for spare in (1000, 4e5, 9e8)]

    assert said[0] == []
    assert "the last 1 of the image encoder's 2 blocks could train as well, --model_layer.thaw.blocks 1" in said[1][0]
    assert "all of the image encoder could train as well, --model_layer.freeze.image_encoder false" in said[2][0]


def test_where_an_encoder_trains_there_may_be_room_for_more_images_or_for_no_recomputing(tiny_need):
    stepper, need = tiny_need
    total = need.fixed_bytes + need.object_bytes
    free = int((total + 4.5 * need.encoder_bytes) / USABLE_SHARE)

    assert "room for a --batch_size up to 5" in describe_cost(stepper, need, 1, free)[1]
    config = build_config(TRAINS_ENCODER | {"model_layer.recompute_encoder": True})
    recomputing = dataclasses.replace(stepper, task=MasksTask(config, stepper.model))
    assert "--model_layer.recompute_encoder false is faster" in describe_cost(recomputing, need, 1, 10**10)[1]


def test_without_an_image_to_try_the_weights_are_counted(tiny_need):
    stepper, _ = tiny_need

    (line,) = describe_cost(stepper, None, 16, 10**9)

    assert "weights 1 MB, gradients and optimizer" in line and "no step could be tried" in line


def test_the_semantic_task_counts_its_head(scenes):
    stepper = build_stepper("vit_tiny_test", kind=SemanticTask)
    stepper.model.semantic_head = SemanticHead(32, 2)
    dataset = read_dataset(scenes, 64)
    stepper.task.table = number_classes({1: "shape"}, False)
    dataset.settings = stepper.task.choose_targets(dataset.settings)

    need = measure_need(stepper, dataset)

    assert need.object_bytes == 0 and need.decoder_bytes > 16 * 16 * 4
    assert "head" in describe_cost(stepper, need, 16, None)[0]
