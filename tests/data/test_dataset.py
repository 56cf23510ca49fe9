import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from finestsam.batch import Batch
from finestsam.config import AugmentConfig, build_config
from finestsam.data.augment import show
from finestsam.data.dataset import SampleDataset, SampleSettings, StepSampler, collate
from finestsam.data.loaders import build_train_loader, build_validation_loader
from finestsam.data.previous_logits import PreviousLogits
from finestsam.data.prompts import build_image_grid
from finestsam.images.frames import compute_input_size, scale_points
from finestsam.masks import decode_rle


def make_settings(**changes: object) -> SampleSettings:
    config = build_config(
        {
            "prompts.use_boxes": True,
            "prompts.use_masks": True,
            "prompts.mix": False,
            "dataset.background_points": 0,
            "dataset.positive_points": 2,
            "dataset.negative_points": 1,
        }
    )
    settings = SampleSettings(64, 16, 0, config.prompts, config.dataset)
    return replace(settings, **changes)


def assert_same(one, other):
    assert one.annotation_ids == other.annotation_ids
    assert torch.equal(one.image, other.image)
    for name in ("points", "labels", "boxes", "mask_logits"):
        assert torch.equal(getattr(one.prompts, name), getattr(other.prompts, name)), name


def test_a_sample_has_the_shapes_and_the_frame_that_the_batch_page_defines(records):
    sample = SampleDataset(records, make_settings())[(0, 2)]
    record, count = records[2], len(records[2].annotations)
    height, width = compute_input_size(record.size, 64)

    assert sample.image.shape == (3, height, width)
    assert sample.image.dtype == torch.uint8
    assert sample.prompts.points.shape == (count, 3, 2)
    assert sample.prompts.labels.tolist()[0][2] in (0, -1)
    assert sample.prompts.boxes.shape == (count, 4)
    assert sample.prompts.mask_logits.shape == (count, 1, 16, 16)
    assert len(sample.prompts) == len(sample) == count
    assert (sample.prompts.boxes[:, 2:] <= torch.tensor([width, height])).all()


def test_positive_points_lie_inside_and_negative_points_outside_their_objects(records):
    dataset = SampleDataset(records, make_settings())
    for position, record in enumerate(records):
        sample = dataset[(3, position)]
        scale = 64 / max(record.size)
        for row, rle in enumerate(sample.rles):
            mask = decode_rle(rle)
            for point, label in zip(sample.prompts.points[row], sample.prompts.labels[row], strict=True):
                if label == 1:  # the pixel that SAM means, half a pixel on in the input frame
                    x, y = np.floor((point.numpy() + 0.5) / scale + 1e-4).astype(int)
                    around = mask[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
                    assert mask[min(y, mask.shape[0] - 1), min(x, mask.shape[1] - 1)] or around.any()


def test_prompts_change_from_epoch_to_epoch_and_nothing_else_changes_them(records):
    first, again = (SampleDataset(records, make_settings()) for _ in range(2))
    again[(5, 0)]  # what was requested before must not matter

    assert_same(first[(1, 2)], again[(1, 2)])
    assert not torch.equal(first[(1, 2)].prompts.boxes, first[(2, 2)].prompts.boxes)
    assert not torch.equal(first[(1, 2)].prompts.points, first[(2, 2)].prompts.points)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_worker_processes_give_the_same_samples_in_the_same_order(records, num_workers):
    sampler = StepSampler(len(records), batch_size=2, seed=5)
    loader = build_train_loader(SampleDataset(records, make_settings()), sampler, num_workers)
    for epoch in (0, 1):
        sampler.epoch = epoch
        expected = [SampleDataset(records, make_settings())[key] for keys in sampler for key in keys]
        found = [sample for batch, _ in loader for sample in batch.samples]
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)


def test_an_image_with_too_many_objects_gives_a_choice_that_changes(records):
    dataset = SampleDataset(records, make_settings(max_objects=3))

    chosen = [tuple(dataset[(epoch, 0)].annotation_ids) for epoch in range(6)]

    assert all(len(ids) == 3 for ids in chosen)
    assert len(set(chosen)) > 1
    assert dataset[(0, 0)].rows == [
        [annotation.id for annotation in records[0].annotations].index(number) for number in chosen[0]
    ]


def test_an_image_that_broke_since_the_check_is_named_and_left_out(records):
    broken = [replace(records[0], path=records[0].path.with_name("gone.png")), records[1]]
    dataset = SampleDataset(broken, make_settings())

    batch, messages = collate([dataset[(0, 0)], dataset[(0, 1)]])

    assert len(batch.samples) == 1
    assert messages == [f"{records[0].file_name}: no such file"]


@pytest.mark.parametrize("length", [1, 4, 7, 12])
def test_the_ranks_share_every_step_as_one_process_would_take_it(length):
    whole = list(StepSampler(length, batch_size=4, seed=1))
    shares = [list(StepSampler(length, batch_size=2, seed=1, rank=rank, world_size=2)) for rank in range(2)]

    assert len(shares[0]) == len(shares[1]) == len(whole)
    for step, keys in enumerate(whole):
        assert sorted(shares[0][step] + shares[1][step]) == sorted(keys)


def test_an_epoch_is_continued_in_its_middle_and_reshuffled_in_the_next():
    sampler = StepSampler(10, batch_size=3, seed=1)
    whole = list(sampler)
    sampler.first_batch = 2
    assert list(sampler) == whole[2:]
    assert len(sampler) == 2
    sampler.first_batch, sampler.epoch = 0, 1
    assert [key[1] for keys in sampler for key in keys] != [key[1] for keys in whole for key in keys]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_validation_sees_every_image_once_whatever_the_number_of_ranks(records, world_size):
    dataset = SampleDataset(records, make_settings())
    loaders = [build_validation_loader(dataset, 0, rank, world_size) for rank in range(world_size)]

    seen = [sample.image_id for loader in loaders for batch, _ in loader for sample in batch.samples]

    assert sorted(seen) == sorted(record.image_id for record in records)


def test_previous_logits_are_those_of_the_epoch_before(tmp_path):
    memory = PreviousLogits(tmp_path, object_count=5, side=4)
    memory.create()
    logits = torch.arange(32).reshape(2, 4, 4).float()

    memory.write(0, [1, 3], logits)
    found, is_known = memory.read(1, [3, 0, 1])

    assert is_known.tolist() == [True, False, True]
    assert torch.equal(found[0, 0], logits[1])
    # Written in the epoch that runs: not to be read before the next.
    memory.write(1, [3], -logits[:1])
    assert torch.equal(memory.read(1, [3])[0][0, 0], logits[1])
    assert torch.equal(memory.read(2, [3])[0][0, 0], -logits[0])
    assert memory.read(2, [1])[1].tolist() == [False]  # two epochs old
    assert memory.read(3, [3])[1].tolist() == [False]


def test_previous_logits_become_mask_prompts_where_they_are_known(records, tmp_path):
    config = build_config({"prompts.use_logits": True, "prompts.use_boxes": False, "prompts.mix": False})
    count = sum(len(record.annotations) for record in records)
    memory = PreviousLogits(tmp_path, count, side=16)
    memory.create()
    dataset = SampleDataset(records, make_settings(prompts=config.prompts), memory)
    first = dataset[(0, 0)]
    assert not first.prompts.has_mask.any()

    memory.write(0, first.rows[:2], torch.full((2, 16, 16), 2.5))
    second = dataset[(1, 0)]

    assert second.prompts.has_mask.tolist() == [True, True] + [False] * (len(second) - 2)
    assert (second.prompts.mask_logits[0] == 2.5).all()


def test_a_batch_counts_its_objects_and_goes_to_a_device_whole(records):
    dataset = SampleDataset(records, make_settings())
    batch = Batch([dataset[(0, 0)], dataset[(0, 1)]])

    assert batch.object_count == len(records[0].annotations) + len(records[1].annotations)
    moved = batch.to("meta")
    assert moved.samples[0].image.device.type == moved.samples[1].prompts.boxes.device.type == "meta"


def test_what_is_drawn_for_one_kind_of_prompt_does_not_depend_on_the_others(records):
    everything = SampleDataset(records, make_settings())[(1, 2)].prompts
    kinds = {"use_points": ("points", "labels"), "use_boxes": ("boxes",), "use_masks": ("mask_logits", "has_mask")}
    for wanted, names in kinds.items():
        prompts = build_config({f"prompts.{kind}": kind == wanted for kind in kinds} | {"prompts.mix": False}).prompts
        alone = SampleDataset(records, make_settings(prompts=prompts))[(1, 2)].prompts
        for name in ("points", "labels", "boxes", "mask_logits", "has_mask"):
            if name in names:
                assert torch.equal(getattr(alone, name), getattr(everything, name)), name
            else:
                assert getattr(alone, name) is None, name


def test_workers_start_though_opencv_has_used_its_threads():
    """A forked process waits for ever for threads that OpenCV started in its parent."""
    code = """
import cv2, numpy as np
cv2.setNumThreads(2)
cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.float32), (0, 0), 3)
from finestsam.data.loaders import build_validation_loader
from finestsam.runtime.processes import map_in_processes
print(sum(map_in_processes(abs, range(-100, 0), "")))
class Numbers(list):
    def __getitem__(self, key): return None
print(len(list(build_validation_loader(Numbers([1, 2, 3]), num_workers=2))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)

    assert done.stdout.split() == ["5050", "3"], done.stderr


def test_of_mixed_kinds_an_image_is_requested_one_and_every_epoch_for_another(records):
    config = build_config({"prompts.use_boxes": True, "prompts.mix": True})
    dataset = SampleDataset(records, make_settings(prompts=config.prompts))

    kinds = set()
    for epoch in range(12):
        prompts = dataset[(epoch, 0)].prompts
        assert (prompts.points is None) != (prompts.boxes is None)
        kinds.add(prompts.points is None)
        again = dataset[(epoch, 0)].prompts
        assert (again.points is None) == (prompts.points is None)
    assert kinds == {False, True}


def test_background_points_lie_on_the_grid_and_in_no_object(records):
    config = build_config({"dataset.background_points": 5, "prompts.use_boxes": False})
    dataset = SampleDataset(records, make_settings(dataset=config.dataset, max_objects=1))

    for position, record in enumerate(records):
        sample = dataset[(0, position)]
        taken = sum(decode_rle(record.rle(annotation)) for annotation in record.annotations)
        assert 1 <= len(sample.background) <= 5 and (sample.background.labels == 1).all()
        grid = build_image_grid(16, record.size)
        wanted = torch.from_numpy(scale_points(grid, record.size, sample.input_size)).float()
        for (point,) in sample.background.points:
            ((x, y),) = grid[(wanted == point).all(dim=1)] + 0.5 * max(record.size) / 64
            assert not taken[min(int(y), record.size[0] - 1), min(int(x), record.size[1] - 1)]
        assert torch.equal(sample.background.points, dataset[(0, position)].background.points)
    assert len(SampleDataset(records, make_settings())[(0, 0)].background) == 0


def test_what_a_crop_leaves_of_an_object_is_no_background(records):
    config = build_config({"dataset.background_points": 1000, "prompts.use_boxes": False})
    crops = AugmentConfig(crop_min=0.2)
    dataset = SampleDataset(records, make_settings(dataset=config.dataset, augment=crops))
    cut_off = 0

    for epoch, record in enumerate(records * 3):
        sample = dataset[(epoch, epoch % len(records))]
        view, shown = dataset._choose_view(record, sample.variant)
        masks = [torch.from_numpy(decode_rle(record.rle(annotation))) for annotation in record.annotations]
        taken = torch.stack([show(mask, view) for mask in masks]).any(dim=0)
        cut_off += sum(bool(show(mask, view).any()) for mask in masks) > len(shown)
        for (point,) in sample.background.points:
            place = scale_points(point[None].double().numpy(), sample.input_size, view.size)[0]
            x, y = np.floor(place + 0.5 * max(view.size) / max(sample.input_size) + 1e-4).astype(int)
            assert not taken[min(y, view.size[0] - 1), min(x, view.size[1] - 1)]
    assert cut_off  # in some images objects are seen that are too cut to be requested


def test_an_object_is_requested_at_several_points_that_share_its_weight(records):
    config = build_config({"dataset.prompts_per_object": 3, "prompts.use_masks": True, "prompts.mix": False})
    dataset = SampleDataset(records, make_settings(prompts=config.prompts, dataset=config.dataset, max_objects=4))
    once = SampleDataset(records, make_settings(prompts=config.prompts, max_objects=4))[(1, 0)]

    sample = dataset[(1, 0)]

    assert sample.object_count == len(once) == 4
    assert len(sample) == len(sample.prompts) == len(sample.rows) == len(sample.prompts.has_mask) > 4
    assert sum(sample.weights) == pytest.approx(4)
    for number in once.annotation_ids:
        mine = [row for row, other in enumerate(sample.annotation_ids) if other == number]
        assert mine == list(range(mine[0], mine[-1] + 1)) and 1 <= len(mine) <= 3
        assert len({tuple(sample.prompts.points[row, 0].tolist()) for row in mine}) == len(mine)
        for row in mine:  # one box and one mask for all
            assert torch.equal(sample.prompts.boxes[row], sample.prompts.boxes[mine[0]])
            assert torch.equal(sample.prompts.mask_logits[row], sample.prompts.mask_logits[mine[0]])
            assert sample.rows[row] == sample.rows[mine[0]] and sample.rles[row] == sample.rles[mine[0]]
    assert_same(dataset[(1, 0)], sample)
    assert dataset[(2, 0)].prompts.points.tolist() != sample.prompts.points.tolist()


def test_half_of_the_images_are_corrected_others_in_every_epoch(records):
    config = build_config({"prompts.correction_clicks": 3})
    dataset = SampleDataset(records, make_settings(prompts=config.prompts))

    corrected = [[dataset[(epoch, place)].correction_clicks for place in range(len(records))] for epoch in range(20)]

    assert set(sum(corrected, [])) == {0, 3}
    assert 0.35 < np.mean(corrected) / 3 < 0.65
    assert len({tuple(row) for row in corrected}) > 10
    assert SampleDataset(records, make_settings())[(0, 0)].correction_clicks == 0
