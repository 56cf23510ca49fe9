"""CONFORMANCE B: the geometry of annotations."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conformance_zoo import BOXES, HEIGHT, WIDTH, assert_refused, assert_skipped, polygon
from test_conformance_structure import SOUND

from finestsam.config import DatasetConfig, PromptsConfig
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.read import read_training_set
from finestsam.images.files import read_image
from finestsam.masks import decode_rle, encode_mask, rle_area, rle_box, rle_to_json
from finestsam.records import Annotation, Record


def make_mask(box: tuple[int, int, int, int]) -> np.ndarray:
    x, y, width, height = box
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def make_rle(box: tuple[int, int, int, int] = BOXES[1], as_list: bool = False) -> dict:
    mask = make_mask(box)
    if not as_list:
        return rle_to_json(encode_mask(mask))
    flat = np.concatenate([[0], mask.ravel(order="F"), [2]])
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()}


@pytest.mark.parametrize("segmentation", [[], [[]], None, ..., {}, ""])
def test_case_24_an_empty_segmentation_is_skipped_and_its_box_only_taken_when_prompted(zoo, segmentation):
    zoo.add(9, segmentation=segmentation, bbox=[100, 80, 20, 10])

    outcome = assert_skipped(zoo, 9, "empty_segmentation")

    assert "--dataset.masks_from_boxes" in outcome.out
    assert zoo.check("--dataset.masks_from_boxes").usable[9] == (200, [100, 80, 20, 10])


@pytest.mark.parametrize("parts", [[[1, 1]], [[1, 1, 5, 5]], [[1], [1, 1, 5, 5]], [[1, 2, 3, 4], []]])
def test_case_25_a_polygon_of_too_few_points_is_skipped(zoo, parts):
    zoo.add(9, segmentation=parts)

    outcome = zoo.check()

    assert outcome.skipped.keys() == {9}
    assert outcome.skipped[9] in ("too_few_points", "odd_coordinates")


def test_case_25_such_a_part_is_dropped_where_others_remain(zoo):
    zoo.annotations[0]["segmentation"] = [[1, 1, 5, 5], polygon(BOXES[1]), [3, 3]]

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert "2 parts with fewer than three points left out" in outcome.message("part_dropped")


def test_case_26_an_odd_number_of_coordinates_is_not_cut_in_silence(zoo):
    zoo.add(9, segmentation=[[*polygon(BOXES[1]), 7]])

    assert_skipped(zoo, 9, "odd_coordinates")


def test_case_27_a_flat_list_is_one_polygon(zoo):
    zoo.annotations[0]["segmentation"] = polygon(BOXES[1])

    outcome = zoo.check()

    assert (outcome.usable, outcome.remarks) == (SOUND, ["flat_polygon"])


def test_case_28_coordinates_as_text_are_read_and_other_text_skipped(zoo):
    zoo.annotations[0]["segmentation"] = [[str(number) for number in polygon(BOXES[1])]]
    zoo.add(9, segmentation=[["a", "b", "c", "d", "e", "f"]])
    zoo.add(10, segmentation=[[None, 1, 2, 3, 4, 5]])
    zoo.add(11, segmentation="polygon")

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert outcome.remarks == ["text_coordinates"]
    assert outcome.skipped == {9: "not_a_number", 10: "not_a_number", 11: "not_a_polygon"}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e12", "2e8", "-1e300"])
def test_cases_29_and_30_no_coordinate_takes_all_memory(zoo, value):
    zoo.add(9, segmentation=[[10, 20, "X", 20, 50, 50, 10, 50]])

    outcome = zoo.check_apart(text=json.dumps(zoo.content).replace('"X"', value))

    assert outcome.code == 0
    assert outcome.skipped[9] in ("not_finite", "far_outside")
    assert outcome.usable == SOUND


@pytest.mark.parametrize(
    ("box", "area", "code"),
    [
        ((-0.5, 20, 40.5, 30), 1200, []),
        ((-20, 20, 60, 30), 1200, ["clipped"]),
        ((140, 100, 500, 500), 400, ["clipped"]),
    ],
)
def test_case_31_what_leaves_the_image_is_cut_at_its_edge(zoo, box, area, code):
    zoo.add(9, segmentation=[polygon(box)], bbox=...)

    outcome = zoo.check()

    assert outcome.usable[9][0] == area
    assert outcome.remarks == code


def test_case_31_what_lies_outside_is_empty(zoo):
    zoo.add(9, segmentation=[polygon((500, 500, 20, 20))], bbox=...)

    assert "empty_mask" in zoo.check().skipped.values()


@pytest.mark.parametrize("points", [[10, 10, 50, 10, 90, 10], [10, 10, 10, 10, 10, 10], [5, 5, 9, 9, 5, 5]])
def test_case_32_a_polygon_without_area_is_skipped(zoo, points):
    zoo.add(9, segmentation=[points], bbox=...)

    assert_skipped(zoo, 9, "empty_mask")


def test_case_33_what_vanishes_at_the_models_size_is_skipped(zoo):
    zoo.write_image("large.png", size=(300, 3000))
    zoo.content["images"].append({"id": 3, "file_name": "large.png", "width": 3000, "height": 300})
    zoo.add(9, image_id=3, segmentation=[polygon((10, 10, 2, 2))], bbox=...)
    zoo.add(10, image_id=3, segmentation=[polygon((10, 10, 20, 20))], bbox=...)

    outcome = zoo.check()

    assert outcome.skipped == {9: "vanishes"}
    assert "vanishes at 1024 pixels" in outcome.message("vanishes")
    assert zoo.check("--model.image_size=3008").skipped == {}


def test_case_34_winding_and_crossing_edges_are_filled(zoo):
    backwards = np.array(polygon(BOXES[1])).reshape(-1, 2)[::-1].ravel().tolist()
    zoo.annotations[0]["segmentation"] = [backwards]
    zoo.add(9, segmentation=[[60, 60, 100, 100, 100, 60, 60, 100]], bbox=...)

    outcome = zoo.check("--strict")

    assert outcome.code == 0
    assert outcome.usable[1] == SOUND[1]
    assert outcome.usable[9][0] == pytest.approx(800, rel=0.1)


def test_case_35_parts_are_one_object_and_holes_stay_holes(zoo):
    zoo.annotations[0]["segmentation"] = [polygon((10, 20, 10, 10)), polygon((40, 40, 10, 10))]
    holed = make_mask(BOXES[2]) & ~make_mask((90, 30, 10, 10))
    zoo.annotations[1]["segmentation"] = rle_to_json(encode_mask(holed))

    outcome = zoo.check("--strict")

    assert outcome.usable[1] == (200, [10, 20, 40, 30])
    assert outcome.usable[2] == (1400, [80, 20, 30, 50])


@pytest.mark.parametrize("segmentation", [make_rle(as_list=True), [polygon(BOXES[1])]])
def test_case_36_a_crowd_is_left_out_and_is_no_defect(zoo, segmentation):
    zoo.add(9, iscrowd=1, segmentation=segmentation)

    outcome = zoo.check("--strict")

    assert (outcome.code, outcome.skipped, outcome.usable) == (0, {9: "crowd"}, SOUND)
    assert zoo.check("--dataset.include_crowd").usable.keys() == {*SOUND, 9}
    zoo.write()
    (record, _) = read_training_set(DatasetConfig(path=str(zoo.root), val_size=0.0, use_cache=False)).train
    assert [decode_rle({"size": [HEIGHT, WIDTH], "counts": counts}).sum() for counts in record.crowds] == [1200]


def test_case_36_nothing_but_crowds_is_explained(zoo):
    for annotation in zoo.annotations:
        annotation["iscrowd"] = 1
    zoo.write()

    assert zoo.check().code == 2
    with pytest.raises(Exception, match="every annotation is a crowd region; .* set iscrowd to 0 or"):
        read_training_set(DatasetConfig(path=str(zoo.root), use_cache=False))


@pytest.mark.parametrize("as_list", [True, False])
def test_case_37_run_lengths_of_both_kinds_are_objects(zoo, as_list):
    zoo.annotations[0]["segmentation"] = make_rle(as_list=as_list)

    assert zoo.check("--strict").usable == SOUND


@pytest.mark.parametrize(
    "counts",
    [
        [10, 20], [], [HEIGHT * WIDTH + 1], "", make_rle()["counts"][:-1], make_rle()["counts"] + "1", "~~~", "\u00e9",
        "0" * 5000, 7, None, [[1, 2]],
    ],
)  # fmt: skip
def test_case_38_run_lengths_that_do_not_fill_the_image_are_skipped(zoo, counts):
    zoo.add(9, segmentation={"size": [HEIGHT, WIDTH], "counts": counts})

    outcome = zoo.check_apart()

    assert outcome.skipped == {9: "rle_counts"}
    assert outcome.usable == SOUND


@pytest.mark.parametrize(
    ("size", "message"),
    [([WIDTH, HEIGHT], "height and width look exchanged"), ([2 * HEIGHT, 2 * WIDTH], "run lengths of size")],
)
def test_case_39_run_lengths_of_another_size_are_skipped(zoo, size, message):
    mask = np.zeros(size, dtype=bool)
    mask[5:20, 5:20] = True
    zoo.add(9, segmentation=rle_to_json(encode_mask(mask)))

    assert message in assert_skipped(zoo, 9, "rle_size").message("rle_size")


def test_case_40_a_huge_size_is_skipped_without_memory_for_it(zoo):
    zoo.add(9, segmentation={"size": [100_000, 100_000], "counts": [0, 10_000_000_000]})

    assert zoo.check_apart().skipped == {9: "rle_size"}


@pytest.mark.parametrize(
    ("segmentation", "code"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": [100.5, HEIGHT * WIDTH - 100.5]}, "rle_counts"),
        ({"size": [HEIGHT, WIDTH], "counts": [-5, 10, HEIGHT * WIDTH - 5]}, "rle_counts"),
        ({"counts": make_rle()["counts"]}, "rle_size"),
        ({"size": [HEIGHT], "counts": make_rle()["counts"]}, "rle_size"),
        ({"size": "120x160", "counts": make_rle()["counts"]}, "rle_size"),
        ({"size": [HEIGHT, WIDTH]}, "rle_counts"),
    ],
)
def test_case_41_counts_and_sizes_that_are_none_are_skipped(zoo, segmentation, code):
    zoo.add(9, segmentation=segmentation)

    assert_skipped(zoo, 9, code)


@pytest.mark.parametrize(
    "bbox", [[10, 20, 0, 30], [10, 20, -40, 30], [10, 20, 40], [], "text", ["10", 20, 40, 30], [None] * 4, {"x": 1}]
)
def test_case_42_a_box_that_is_none_is_taken_from_the_mask(zoo, bbox):
    zoo.annotations[0]["bbox"] = bbox

    outcome = zoo.check("--strict")

    assert (outcome.usable, outcome.remarks) == (SOUND, ["bad_bbox"])


@pytest.mark.parametrize("bbox", [[10, 20, 48, 40], [100, 90, 40, 30], [10.4, 20.2, 3.0, 3.0]])
def test_case_43_a_box_that_disagrees_with_the_mask_is_reported(zoo, bbox):
    zoo.annotations[0]["bbox"] = bbox

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert outcome.remarks == ([] if bbox == [10, 20, 48, 40] else ["bbox_disagrees"])


def test_case_44_the_same_mask_twice_is_reported_and_dropped_when_prompted(zoo):
    zoo.add(9)

    outcome = zoo.check()
    assert outcome.usable.keys() == {*SOUND, 9}
    assert "the same mask as annotation 1" in outcome.message("duplicate_mask")

    outcome = zoo.check("--dataset.dedup")
    assert (outcome.usable, outcome.skipped) == (SOUND, {9: "duplicate_mask"})


def make_dataset(zoo, masks: list[np.ndarray], **changes: object) -> SampleDataset:
    """Return a dataset of one image with these masks."""
    path = zoo.write_image("m.png", size=masks[0].shape)
    annotations = []
    for number, mask in enumerate(masks, start=1):
        rle = encode_mask(mask)
        annotations.append(Annotation(number, 1, rle["counts"], rle_area(rle), rle_box(rle)))
    record = Record(1, "m.png", path, masks[0].shape, annotations)
    dataset = DatasetConfig(positive_points=2, negative_points=2)
    settings = SampleSettings(64, 32, 0, PromptsConfig(use_boxes=True, use_masks=True, mix=False), dataset)
    return SampleDataset([record], replace(settings, **changes))


def test_case_45_thousands_of_objects_are_drawn_a_few_at_a_time(zoo):
    masks = [make_mask((number % 150, number // 50, 5, 5)) for number in range(5000)]
    dataset = make_dataset(zoo, masks, max_objects=50)

    samples = [dataset[(epoch, 0)] for epoch in (0, 0, 1)]

    assert [len(sample) for sample in samples] == [50, 50, 50]
    assert samples[0].annotation_ids == samples[1].annotation_ids != samples[2].annotation_ids
    everything = replace(dataset.settings, max_objects=0)
    assert len(SampleDataset(dataset.records, everything)[(0, 0)]) == 5000


def test_case_46_an_image_without_objects_is_kept_for_validation_alone(zoo):
    zoo.annotations.pop()
    zoo.write()

    assert "2 usable (1 without objects)" in zoo.check("--strict").out
    data = read_training_set(DatasetConfig(path=str(zoo.root), val_size=0.0, use_cache=False))
    data.drop_vanishing(1024)
    assert [record.file_name for record in data.train] == ["a.png"]


def test_case_47_a_mask_without_outside_has_no_negative_point(zoo):
    sample = make_dataset(zoo, [np.ones((HEIGHT, WIDTH), dtype=bool)])[(0, 0)]

    assert sample.prompts.labels.tolist() == [[1, 1, -1, -1]]


def test_case_48_a_mask_of_one_pixel_has_its_point_inside(zoo):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[33, 44] = True
    sample = make_dataset(zoo, [mask], dataset=DatasetConfig(positive_points=3, snap_to_grid=False))[(0, 0)]

    scale = 64 / WIDTH
    np.testing.assert_allclose(sample.prompts.points[0], [[44 * scale, 33 * scale]] * 3)
    assert sample.prompts.labels.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("kind", ["ring", "c"])
def test_case_49_the_centre_of_a_ring_lies_in_its_body(zoo, kind):
    mask = make_mask((20, 20, 80, 80)) & ~make_mask((35, 35, 65 if kind == "c" else 50, 50))
    dataset = DatasetConfig(positive_points=1, use_center=True, snap_to_grid=False)
    sample = make_dataset(zoo, [mask], dataset=dataset)[(0, 0)]

    x, y = (sample.prompts.points[0, 0] * WIDTH / 64).round().int().tolist()
    assert mask[y, x]


def test_masks_and_images_have_one_size(zoo):
    zoo.write()
    (first, _) = read_training_set(DatasetConfig(path=str(zoo.root), val_size=0.0, use_cache=False)).train

    assert read_image(first.path, first.size).shape[:2] == decode_rle(first.rle(first.annotations[0])).shape


def test_a_box_only_export_is_refused_with_what_would_help(zoo):
    for annotation in zoo.annotations:
        annotation["segmentation"] = []

    outcome = zoo.check()
    assert outcome.code == 2
    assert "--dataset.masks_from_boxes" in outcome.out
    assert zoo.check("--dataset.masks_from_boxes").usable == SOUND


def test_a_list_of_results_is_no_dataset(zoo):
    results = [{"image_id": 1, "category_id": 1, "segmentation": make_rle(), "score": 0.5}]

    assert_refused(zoo.check(text=json.dumps(results)), "COCO results, without images")
