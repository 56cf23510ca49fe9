import copy
from dataclasses import replace

import pytest
import torch
from lightning.fabric import Fabric

from finestsam.config import DatasetConfig, build_config
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.read import read_training_set
from finestsam.data.synthetic import write_scenes
from finestsam.errors import UserError
from finestsam.prediction.embedder import Embedder
from finestsam.records import Record
from finestsam.tasks.masks import MasksTask
from finestsam.training import probe
from finestsam.training.optim import build_optimizer
from finestsam.training.probe import choose_chunk_objects, find_free_bytes, measure_need
from finestsam.training.step import Stepper
from finestsam.training.trainable import freeze_


@pytest.fixture
def make_stepper(tiny_sam):
    def make(**values) -> Stepper:
        config = build_config({name.replace("__", "."): value for name, value in values.items()})
        model = copy.deepcopy(tiny_sam).train()
        freeze_(model, config)
        model.sam.image_encoder.recomputes = config.model_layer.recompute_encoder
        optimizer = build_optimizer(model, config.opt)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        task = MasksTask(config, model)
        return Stepper(Fabric(accelerator="cpu", devices=1), task, optimizer, scaler, Embedder(model))

    return make


@pytest.fixture
def dataset(records) -> SampleDataset:
    config = build_config({})
    return SampleDataset(records, SampleSettings(64, 16, 0, config.prompts, config.dataset))


def test_the_heaviest_image_is_tried(make_stepper, dataset):
    need = measure_need(make_stepper(), dataset)

    assert len(need.sample) == max(len(record.annotations) for record in dataset.records)


@pytest.mark.parametrize(
    ("resolution", "max_objects", "side"), [("original", 0, 400), ("low", 0, 96), ("low", 4, 400), ("input", 0, 96)]
)
def test_the_heaviest_image_has_the_most_pixels_of_masks(make_stepper, tmp_path, resolution, max_objects, side):
    small, large = (read_scene(tmp_path / str(size), size) for size in (96, 400))
    small, large = (
        replace(record, annotations=record.annotations[:1] * count) for record, count in ((small, 12), (large, 5))
    )
    lone = replace(large, image_id=9, annotations=large.annotations[:1], size=(9000, 9000))  # nothing to tell two by
    config = build_config({"losses.resolution": resolution})
    settings = SampleSettings(64, 16, 0, config.prompts, config.dataset, max_objects=max_objects)

    need = measure_need(make_stepper(losses__resolution=resolution), SampleDataset([lone, large, small], settings))

    assert need.sample.original_size == (side, side)


def read_scene(folder, side: int) -> Record:
    write_scenes(folder, count=1, size=(side, side))
    return read_training_set(DatasetConfig(path=str(folder), val_size=0.0, use_cache=False)).train[0]


def test_the_need_of_many_objects_is_reported_from_few(make_stepper, dataset):
    stepper = make_stepper()
    need = measure_need(stepper, dataset)
    known = {weight.untyped_storage().data_ptr() for weight in stepper.model.parameters()}
    embedding = stepper.encode([need.sample])
    assert len(need.sample) >= 4

    kept = [probe._try(lambda n=n: probe._decode(stepper, embedding, need.sample, n), known)[0] for n in (1, 4)]

    assert kept[1] - kept[0] == pytest.approx(3 * need.object_bytes, rel=0.05)


def test_what_is_freed_on_the_way_does_not_count():
    weight = torch.ones(100, requires_grad=True)

    def work() -> torch.Tensor:
        with torch.enable_grad():
            (2 * weight).square().sum().backward()
        return (3 * weight).square().sum()

    assert probe._try(work, {weight.untyped_storage().data_ptr()})[0] == 100 * 4


def test_images_of_one_object_are_tried_as_well(make_stepper, dataset):
    alone = [replace(record, annotations=record.annotations[:1]) for record in dataset.records]

    need = measure_need(make_stepper(), SampleDataset(alone, dataset.settings))

    assert len(need.sample) == 1
    assert need.object_bytes > 0


def test_there_is_room_for_the_loss_of_the_largest_masks(make_stepper, dataset, tmp_path, monkeypatch):
    large = read_scene(tmp_path, 1500)
    large = replace(large, image_id=9, annotations=large.annotations[:1])
    stepper = make_stepper(losses__resolution="original")
    without = measure_need(stepper, dataset)

    need = measure_need(stepper, SampleDataset([*dataset.records, large], dataset.settings))

    assert need.sample.file_name == without.sample.file_name
    assert need.decoder_bytes > 1.5 * without.decoder_bytes
    monkeypatch.setattr(probe, "find_free_bytes", lambda device: without.fixed_bytes + without.object_bytes)
    choose_chunk_objects(stepper, without)
    with pytest.raises(UserError, match=r"1500 x 1500, 1 object\) needs"):
        choose_chunk_objects(stepper, need)


def test_corrections_need_more_memory_than_the_first_masks_of_an_object(make_stepper, dataset):
    plain, corrected = (
        measure_need(make_stepper(prompts__correction_clicks=clicks), dataset).object_bytes for clicks in (0, 2)
    )

    assert corrected > plain


def test_a_training_encoder_and_more_images_need_more(make_stepper, dataset):
    thawed = {"model_layer__freeze__image_encoder": False}
    needs = [
        measure_need(make_stepper(**values), dataset).fixed_bytes
        for values in ({}, thawed | {"model_layer__recompute_encoder": True}, thawed, thawed | {"batch_size": 4})
    ]

    assert needs == sorted(set(needs))


def test_the_chunk_is_what_fits(make_stepper, dataset, monkeypatch):
    stepper = make_stepper()
    need = measure_need(stepper, dataset)
    chunks = []
    for objects in (1, 3, 10, 1000):
        free = (need.fixed_bytes + (objects + 0.5) * need.object_bytes) / probe.USABLE_SHARE
        monkeypatch.setattr(probe, "find_free_bytes", lambda device, free=free: free)
        chunks.append(choose_chunk_objects(stepper, need))

    assert chunks == [1, 3, 10, probe.MOST_OBJECTS["cpu"]]


def test_what_does_not_fit_is_refused_with_what_needs_less(make_stepper, dataset, monkeypatch):
    monkeypatch.setattr(probe, "find_free_bytes", lambda device: 1_000_000)
    stepper = make_stepper(model_layer__freeze__image_encoder=False, batch_size=2)

    with pytest.raises(UserError) as refusal:
        choose_chunk_objects(stepper, measure_need(stepper, dataset))

    for word in ("objects", "GB are free", "image_encoder true", "recompute_encoder", "batch_size", "resolution low"):
        assert word in str(refusal.value)


def fail_at(monkeypatch, call: int, error: Exception) -> None:
    """Let the losses of a call of the decoder fail, counted from 1; the encoder's pass is 0."""
    decode, encode, calls = probe._decode, Stepper.encode, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise error
        return decode(*arguments)

    def fail_to_encode(*arguments):
        if call == 0:
            raise error
        return encode(*arguments)

    monkeypatch.setattr(probe, "_decode", fail)
    monkeypatch.setattr(Stepper, "encode", fail_to_encode)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("call", [0, 1])
def test_an_image_that_cannot_even_be_tried_is_named_with_what_needs_less(make_stepper, dataset, monkeypatch, call):
    fail_at(monkeypatch, call, FULL)

    with pytest.raises(UserError, match=r"^scene_\d+.png \(\d+ x \d+, \d+ objects\): out of memory; try .*low"):
        measure_need(make_stepper(), dataset)


def test_where_two_objects_do_not_fit_one_is_taken_at_a_time(make_stepper, dataset, monkeypatch):
    fail_at(monkeypatch, 2, FULL)
    stepper = make_stepper()

    need = measure_need(stepper, dataset)

    monkeypatch.setattr(probe, "find_free_bytes", lambda device: need.fixed_bytes + need.object_bytes)
    assert choose_chunk_objects(stepper, need) == 1


def test_another_error_of_the_trial_is_no_matter_of_memory(make_stepper, dataset, monkeypatch):
    fail_at(monkeypatch, 2, RuntimeError("something else"))

    with pytest.raises(RuntimeError, match="^something else$"):
        measure_need(make_stepper(), dataset)


def test_a_system_that_does_not_tell_its_memory_gets_the_usual_chunk(make_stepper, dataset, monkeypatch):
    monkeypatch.setattr(probe, "find_free_bytes", lambda device: None)

    stepper = make_stepper()

    assert choose_chunk_objects(stepper, measure_need(stepper, dataset)) == probe.MOST_OBJECTS["cpu"]


def test_files_that_a_container_keeps_in_memory_count_as_free(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "CGROUP", tmp_path)
    assert probe._read_container_limit() is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 200\nfile 700\ninactive_file 500\nactive_file 150\nshmem 50\n")
    assert probe._read_container_limit() == 750
    (tmp_path / "memory.max").write_text("max\n")
    assert probe._read_container_limit() is None


def test_the_free_memory_is_that_of_the_system_or_the_container(monkeypatch):
    monkeypatch.setattr(probe, "_read_meminfo", lambda: 1000)
    for limit, expected in ((None, 1000), (10, 10), (5000, 1000)):
        monkeypatch.setattr(probe, "_read_container_limit", lambda limit=limit: limit)
        assert find_free_bytes(torch.device("cpu")) == expected
    assert find_free_bytes(torch.device("meta")) is None
