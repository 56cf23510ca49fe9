import csv
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_training

from finestsam.batch import Sample
from finestsam.cli import main
from finestsam.config import AugmentConfig, build_config
from finestsam.data.augment import find_shown, sample_view, show, show_image, show_object
from finestsam.data.dataset import SampleDataset, SampleSettings, StepSampler
from finestsam.data.loaders import build_train_loader
from finestsam.data.prompts import build_image_grid, cut_out, find_grid_points_inside
from finestsam.images.files import read_image, write_image
from finestsam.images.frames import resize_image, scale_points
from finestsam.masks import decode_rle, encode_mask, rle_area, rle_box
from finestsam.records import Annotation, Record

SIZE = (80, 120)
BACKGROUND = (20, 20, 20)
EVERYTHING = {"orientations": "all", "crop_min": 0.2}
COLOURS = {"light": 0.4, "colour": 0.4}


def render_labels() -> np.ndarray:
    """Return a label map of five objects, some at the edges, one with a hole, one in two parts; 0 is background."""
    labels = np.zeros(SIZE, dtype=np.uint8)
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]]
    distance = np.hypot(ys - 40, xs - 60)
    labels[(distance < 26) & (distance > 10)] = 1
    labels[:18, :25] = 2
    labels[66:, 95:] = 3
    labels[5:20, 90:110] = 4
    labels[30:36, 4:20] = labels[44:60, 8:20] = 5
    return labels


def find_colour(label: int) -> np.ndarray:
    return np.array(BACKGROUND if label == 0 else (40 * label, 250 - 40 * label, 30 * (label % 3) + 60), dtype=np.uint8)


def write_record(path: Path, labels: np.ndarray, image_id: int = 7) -> Record:
    """Write an image in which every object has one colour of its own; object k has id k."""
    write_image(path, np.stack([find_colour(label) for label in range(6)])[labels])
    rles = {label: encode_mask(labels == label) for label in range(1, labels.max() + 1)}
    annotations = [Annotation(label, 1, rle["counts"], rle_area(rle), rle_box(rle)) for label, rle in rles.items()]
    return Record(image_id, path.name, path, labels.shape, annotations)


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Record:
    return write_record(tmp_path_factory.mktemp("images") / "objects.png", render_labels())


def make_settings(augment: dict, image_size: int = 120, max_objects: int = 0, **values: object) -> SampleSettings:
    wanted = {"prompts.use_boxes": True, "prompts.use_masks": True, "prompts.mix": False}
    wanted |= {"dataset.positive_points": 3, "dataset.negative_points": 3}
    config = build_config(wanted | values)
    return SampleSettings(
        image_size, 32, 0, config.prompts, config.dataset, max_objects, AugmentConfig(**augment), jitters_boxes=False
    )


def assert_same(one: Sample, other: Sample) -> None:
    assert (one.original_size, one.input_size, one.variant) == (other.original_size, other.input_size, other.variant)
    assert (one.annotation_ids, one.rows, one.rles) == (other.annotation_ids, other.rows, other.rles)
    assert torch.equal(one.image, other.image)
    for name in ("points", "labels", "boxes", "mask_logits"):
        assert torch.equal(getattr(one.prompts, name), getattr(other.prompts, name)), name


@pytest.mark.parametrize("seed", range(60))
def test_every_pixel_of_a_mask_stays_on_its_object(record, seed):
    """The shown image holds where its pixels come from, so that masks and image can be compared pixel by pixel."""
    labels = render_labels()
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.uint8)
    view = sample_view(AugmentConfig(**EVERYTHING), SIZE, np.random.default_rng(seed))

    shown_xs, shown_ys, shown_labels = np.moveaxis(show_image(np.stack([xs, ys, labels], axis=2), view), 2, 0)

    assert shown_xs.shape == view.size
    assert (shown_labels == labels[shown_ys, shown_xs]).all()
    x, y, width, height = view.window
    assert 0 <= x < x + width <= SIZE[1]
    assert 0 <= y < y + height <= SIZE[0]
    assert len(set(zip(shown_xs.ravel(), shown_ys.ravel(), strict=True))) == width * height
    assert (shown_xs.min(), shown_ys.min()) == (x, y)
    positions = find_shown(record, view, 120)
    shares = [(shown_labels == each.id).sum() / each.area for each in record.annotations]
    assert positions.tolist() == [place for place, share in enumerate(shares) if share >= 0.1]
    for place in positions:
        shown = show_object(record, record.annotations[place], view)
        assert (shown.mask == (shown_labels == shown.annotation_id)).all()
        assert (decode_rle(shown.rle) == shown.mask).all()
        rows, columns = shown.mask.any(axis=1).nonzero()[0], shown.mask.any(axis=0).nonzero()[0]
        assert shown.box == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]


def test_turns_and_mirrors_are_those_of_their_names():
    pixels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    shown = {}
    for seed in range(100):
        view = sample_view(AugmentConfig(orientations="all"), (2, 3), np.random.default_rng(seed))
        shown[view.quarter_turns, view.is_mirrored] = show(pixels, view).tolist()

    assert shown == {
        (0, False): [[1, 2, 3], [4, 5, 6]],
        (0, True): [[3, 2, 1], [6, 5, 4]],
        (1, False): [[3, 6], [2, 5], [1, 4]],
        (1, True): [[6, 3], [5, 2], [4, 1]],
        (2, False): [[6, 5, 4], [3, 2, 1]],
        (2, True): [[4, 5, 6], [1, 2, 3]],  # top to bottom
        (3, False): [[4, 1], [5, 2], [6, 3]],
        (3, True): [[1, 4], [2, 5], [3, 6]],
    }


@pytest.mark.parametrize("epoch", range(12))
@pytest.mark.parametrize("snap_to_grid", [True, False])
def test_flipped_and_turned_samples_keep_points_boxes_and_masks_on_the_objects_exactly(record, epoch, snap_to_grid):
    settings = make_settings({"orientations": "all"}, **{"dataset.snap_to_grid": snap_to_grid})
    sample = SampleDataset([record], settings)[(epoch, 0)]

    image = sample.image.permute(1, 2, 0).numpy()
    assert sorted(sample.input_size) == sorted(SIZE)
    assert sample.annotation_ids == [1, 2, 3, 4, 5]
    for row, label in enumerate(sample.annotation_ids):
        is_object = (image == find_colour(label)).all(axis=2)
        assert (is_object == decode_rle(sample.rles[row])).all()
        x, y, width, height = rle_box(sample.rles[row])
        assert sample.prompts.boxes[row].tolist() == [x, y, x + width, y + height]
        pixels = np.floor(sample.prompts.points[row].numpy() + 0.5).astype(int)
        assert (sample.prompts.labels[row, 3:] == 0).all()
        for (x, y), kind in zip(pixels, sample.prompts.labels[row], strict=True):
            assert kind == -1 or is_object[y, x] == bool(kind)


@pytest.mark.parametrize("epoch", range(20))
def test_scaled_and_cropped_samples_keep_points_and_boxes_on_the_objects(record, epoch):
    settings = make_settings(EVERYTHING, **{"dataset.snap_to_grid": False})
    sample = SampleDataset([record], settings)[(epoch, 0)]

    image = sample.image.permute(1, 2, 0).numpy()
    assert image.shape[:2] == sample.input_size
    for row, label in enumerate(sample.annotation_ids):
        mask = decode_rle(sample.rles[row])
        assert mask.shape == sample.original_size
        cover = resize_image(np.repeat(mask[:, :, None], 3, axis=2).astype(np.uint8) * 255, sample.input_size)
        assert (image[(cover == 255).all(axis=2)] == find_colour(label)).all()
        assert (image[(cover == 0).all(axis=2)] != find_colour(label)).any(axis=1).all()

        scale = np.array(sample.input_size[::-1]) / sample.original_size[::-1]
        x, y, width, height = rle_box(sample.rles[row])
        expected = np.array([x, y, x + width, y + height]) * np.tile(scale, 2)
        np.testing.assert_allclose(sample.prompts.boxes[row], expected, atol=1e-4)

        pixels = np.round(sample.prompts.points[row].numpy() / scale).astype(int)
        for (x, y), kind in zip(pixels, sample.prompts.labels[row], strict=True):
            assert kind == -1 or mask[y, x] == bool(kind)


@pytest.mark.parametrize("epoch", range(20))
def test_snapped_points_of_scaled_and_cropped_samples_mean_pixels_of_the_objects(record, epoch):
    """SAM adds half a pixel in the input frame, a whole pixel of an image that is shown at half its size."""
    settings = make_settings(EVERYTHING, **{"dataset.positive_points": 1000})
    sample = SampleDataset([record], settings)[(epoch, 0)]

    scale = max(sample.input_size) / max(sample.original_size)
    grid = build_image_grid(32, sample.original_size)
    for row, rle in enumerate(sample.rles):
        mask = decode_rle(rle)
        inside = find_grid_points_inside(cut_out(mask, rle_box(rle)), grid, scale)
        points = sample.prompts.points[row][sample.prompts.labels[row] == 1].numpy()
        if len(inside) == 0:
            continue  # the centre is requested instead
        expected = scale_points(inside, sample.original_size, sample.input_size)
        assert len(points) == len(expected)
        np.testing.assert_allclose(sorted(points.tolist()), sorted(expected.tolist()), atol=1e-4)
        for x, y in np.floor(scale_points(points + 0.5, sample.input_size, sample.original_size) + 1e-4).astype(int):
            assert mask[min(y, mask.shape[0] - 1), min(x, mask.shape[1] - 1)]


def test_a_crop_keeps_at_least_its_share_of_the_image_and_nearly_its_shape():
    augment = AugmentConfig(crop_min=0.25)
    views = [sample_view(augment, (300, 400), np.random.default_rng(seed)) for seed in range(400)]

    shares = [view.size[0] * view.size[1] / 120_000 for view in views]
    aspects = [view.size[1] / view.size[0] / (4 / 3) for view in views]
    assert 0.245 < min(shares) < 0.3
    assert 0.95 < max(shares) <= 1
    assert 3 / 4 - 0.02 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 4 / 3 + 0.02


@pytest.mark.parametrize(("orientations", "count"), [("upright", 1), ("mirrored", 2), ("all", 8)])
def test_every_orientation_is_as_likely(orientations, count):
    augment = AugmentConfig(orientations=orientations)
    views = [sample_view(augment, SIZE, np.random.default_rng(seed)) for seed in range(4000)]

    found = Counter((view.quarter_turns, view.is_mirrored) for view in views)
    assert len(found) == count and (0, False) in found
    assert all(times == pytest.approx(4000 / count, rel=0.15) for times in found.values())
    assert all(view.window == (0, 0, 120, 80) for view in views)
    if orientations == "mirrored":
        assert set(found) == {(0, False), (0, True)}


def test_one_setting_does_not_change_what_another_one_draws():
    alone = sample_view(AugmentConfig(orientations="mirrored", colour=0.1), SIZE, np.random.default_rng(3))
    together = sample_view(AugmentConfig(**EVERYTHING | COLOURS | {"colour": 0.1}), SIZE, np.random.default_rng(3))

    assert (alone.is_mirrored, alone.hue) == (together.is_mirrored, together.hue)


def test_light_and_colour_change_by_as_much_as_they_say():
    views = [
        sample_view(AugmentConfig(light=0.2, colour=0.5), SIZE, np.random.default_rng(seed)) for seed in range(500)
    ]

    for name, middle, most in (("brightness", 1, 0.2), ("contrast", 1, 0.2), ("saturation", 1, 0.5), ("hue", 0, 0.1)):
        changes = np.array([getattr(view, name) for view in views]) - middle
        assert 0.95 * most < changes.max() <= most and -most <= changes.min() < -0.95 * most, name


@pytest.mark.parametrize("augment", [{}, {"variants": 3}])
def test_by_default_a_sample_is_the_plain_image(record, augment):
    sample = SampleDataset([record], make_settings(augment, image_size=64))[(4, 0)]

    assert not AugmentConfig(**augment).is_active
    assert (sample.variant, sample.original_size) == (0, SIZE)
    plain = resize_image(read_image(record.path), sample.input_size)
    assert np.array_equal(sample.image.permute(1, 2, 0), plain)
    assert sample.rles == [record.rle(annotation) for annotation in record.annotations]


def test_colours_change_without_masks_and_prompts(record):
    plain = SampleDataset([record], make_settings({}))[(1, 0)]
    for name, strength in COLOURS.items():
        sample = SampleDataset([record], make_settings({name: strength}))[(1, 0)]
        assert sample.variant == 2
        assert sample.image.dtype == torch.uint8
        assert not torch.equal(sample.image, plain.image), name
        sample.image, sample.variant = plain.image, 0
        assert_same(sample, plain)


def test_a_variant_is_a_pure_function_of_seed_epoch_and_image(record):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, again = (SampleDataset([record], make_settings(EVERYTHING | COLOURS)) for _ in range(2))
    again[(5, 0)]  # what was requested before must not matter

    assert_same(first[(2, 0)], again[(2, 0)])
    assert not torch.equal(first[(2, 0)].image, first[(3, 0)].image)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


def test_images_of_an_epoch_are_varied_each_in_its_own_way(tmp_path):
    records = [write_record(tmp_path / f"{number}.png", render_labels(), number) for number in range(8)]
    dataset = SampleDataset(records, make_settings({"crop_min": 0.3}))

    assert len({dataset[(0, position)].original_size for position in range(8)}) > 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_worker_processes_give_the_same_variants(tmp_path, num_workers):
    records = [write_record(tmp_path / f"{number}.png", render_labels(), number) for number in range(4)]
    dataset = SampleDataset(records, make_settings(EVERYTHING | COLOURS))
    sampler = StepSampler(len(records), batch_size=2, seed=5)
    loader = build_train_loader(dataset, sampler, num_workers)
    for epoch in (0, 1):
        sampler.epoch = epoch
        expected = [dataset[key] for keys in sampler for key in keys]
        found = [sample for batch, _ in loader for sample in batch.samples]
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)


def test_fixed_variants_are_taken_in_turn_with_other_prompts(record):
    dataset = SampleDataset([record], make_settings(EVERYTHING | COLOURS | {"variants": 2}))
    first, second, third = (dataset[(epoch, 0)] for epoch in range(3))

    assert (first.variant, second.variant, third.variant) == (1, 2, 1)
    assert torch.equal(first.image, third.image)
    assert (first.rles, first.rows) == (third.rles, third.rows)
    assert not torch.equal(first.prompts.points, third.prompts.points)
    assert not torch.equal(first.image[:, :20, :20], second.image[:, :20, :20])


def test_a_variant_shows_the_same_image_whatever_objects_are_chosen(record):
    """Its embedding can be kept only then."""
    everything, few = (
        SampleDataset([record], make_settings({"crop_min": 0.05, "variants": 20}, max_objects=limit))
        for limit in (0, 1)
    )
    for epoch in range(20):
        whole, chosen = everything[(epoch, 0)], few[(epoch + 20, 0)]
        assert torch.equal(whole.image, chosen.image)
        assert set(chosen.annotation_ids) <= set(whole.annotation_ids)
        assert len(chosen) == 1


def test_what_a_crop_leaves_out_is_dropped_and_an_image_never_loses_all(tmp_path):
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[4:10, 4:12], labels[70:76, 100:110] = 1, 2
    record = write_record(tmp_path / "sparse.png", labels)
    dataset = SampleDataset([record], make_settings({"crop_min": 0.05}, max_objects=1))
    samples = [dataset[(epoch, 0)] for epoch in range(80)]

    assert {len(sample) for sample in samples} == {1}
    cropped = [sample for sample in samples if sample.original_size != SIZE]
    assert 0 < len(cropped) < len(samples)  # the others would have lost both
    for sample in samples:
        number = sample.annotation_ids[0]
        assert sample.rows == [number - 1]
        assert rle_area(sample.rles[0]) >= 0.1 * record.annotations[number - 1].area


def test_an_object_that_is_shown_too_small_is_dropped(tmp_path):
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[40, 60:62], labels[30:38, 50:80] = 1, 2
    record = write_record(tmp_path / "sizes.png", labels)
    dataset = SampleDataset([record], make_settings({"crop_min": 0.2}, image_size=64))
    samples = [dataset[(epoch, 0)] for epoch in range(60)]

    whole = [sample for sample in samples if len(sample.annotation_ids) == 2]
    assert 0 < len(whole) < len(samples)
    for sample in whole:
        assert 2 * (max(sample.input_size) / max(sample.original_size)) ** 2 >= 1


def test_an_image_too_thin_to_shrink_is_shown_whole(tmp_path):
    record = write_record(tmp_path / "thin.png", np.ones((2, 250), dtype=np.uint8))
    settings = make_settings({"crop_min": 0.3}, image_size=64)

    sizes = {SampleDataset([record], settings)[(epoch, 0)].input_size for epoch in range(20)}

    assert sizes == {(1, 64)}


def test_logits_of_the_epoch_before_are_refused_where_images_move(capsys):
    assert main(["--mode=train", "--dataset=anywhere", "--prompts.use_logits=true", "--augment.orientations=all"]) == 2
    assert "prompts.use_logits needs images that stay in place: leave augment.orientations" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "interval"), [("light=1", r"\[0, 1\)"), ("crop_min=0", r"\(0, 1\]")])
def test_a_setting_outside_its_range_is_named(capsys, flag, interval):
    assert main(["--mode=train", "--dataset=anywhere", f"--augment.{flag}"]) == 2
    assert f"augment.{flag.split('=')[0]} must lie in {interval}".replace("\\", "") in capsys.readouterr().err


def test_a_run_trains_on_variants_validates_on_plain_images_and_continues_exactly(scenes, tmp_path):
    flags = [f"--augment.{name}={value}" for name, value in (EVERYTHING | COLOURS).items()]
    run_training(scenes, tmp_path, "--run_name=plain", "--num_epochs=1")
    run_training(scenes, tmp_path, "--run_name=whole", *flags)
    run_training(scenes, tmp_path, "--run_name=broken", "--max_steps=3", *flags)
    assert main(["--mode=train", f"--resume={tmp_path / 'broken'}", "--max_steps=0"]) == 0

    plain, whole, broken = (_read_figures(tmp_path / name / "metrics.csv") for name in ("plain", "whole", "broken"))
    assert whole[0] == plain[0]  # the baseline on the validation images
    assert whole[1]["total_loss"] != plain[1]["total_loss"]
    assert whole == broken


def _read_figures(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]
