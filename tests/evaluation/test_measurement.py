from pathlib import Path

import numpy as np
import pytest

from finestsam.evaluation.coco_scores import Detections
from finestsam.evaluation.measurement import Measurement, compare, keep_common
from finestsam.evaluation.prompt_scores import ObjectScore
from finestsam.masks import encode_mask, rle_area, rle_box
from finestsam.records import Annotation, Record

SIZE = (40, 60)
COUNT = 30


def make_rle(x: int) -> dict:
    mask = np.zeros(SIZE, dtype=bool)
    mask[5:30, x : x + 20] = True
    return encode_mask(mask)


def make_measurement(shift: int, iou: float, spread: float = 0.05, has_generator: bool = True) -> Measurement:
    """One object an image, found `shift` pixels away; its prompted IoU varies from image to image."""
    noise = np.random.default_rng(0)
    truth, records, scores, found = make_rle(10), [], [], []
    for number in range(COUNT):
        annotation = Annotation(number, 1, truth["counts"], rle_area(truth), rle_box(truth))
        records.append(Record(100 + number, f"{number}.png", Path(f"{number}.png"), SIZE, [annotation]))
        value = iou + spread * noise.standard_normal()
        scores.append(ObjectScore(100 + number, number, value, value, value, value, 0.5))
        found.append(Detections([make_rle(10 + shift)], [0.9]))
    return Measurement(records, found if has_generator else None, {"point": scores})


def test_two_models_are_compared_on_the_images_that_both_could_be_measured_on():
    ours, theirs = make_measurement(0, 0.7), make_measurement(3, 0.6)
    known = {record.image_id for record in ours.records}

    ours, theirs = keep_common(ours.keep(known - {103}), theirs.keep(known - {100, 110}))

    for one in (ours, theirs):
        assert {record.image_id for record in one.records} == known - {100, 103, 110}
        assert len(one.found) == one.figures["point/objects"] == COUNT - 3
    assert [row["file_name"] for row in ours.list_images()] == [row["file_name"] for row in theirs.list_images()]


def test_figures_have_flat_names():
    figures = make_measurement(0, 0.7).figures

    assert figures["generator/ap"] == pytest.approx(1)
    assert figures["point/iou"] == pytest.approx(0.7, abs=0.05)
    assert (figures["point/objects"], figures["generator/masks_per_image"]) == (COUNT, 1)


def test_a_difference_lies_in_its_interval():
    differences = compare(make_measurement(0, 0.7), make_measurement(2, 0.6))

    assert differences["point/iou"].value == pytest.approx(0.1)
    assert differences["generator/ap"].value > 0.1
    for difference in differences.values():
        assert difference.low <= difference.value <= difference.high


def test_what_is_hard_for_both_is_no_difference():
    """The images vary by far more than the models differ, and both alike: the interval is as narrow as that."""
    difference = compare(make_measurement(0, 0.61, spread=0.3), make_measurement(0, 0.6, spread=0.3))["point/iou"]

    assert difference.high - difference.low < 1e-9
    assert difference.value == pytest.approx(0.01)


def test_an_interval_is_as_wide_as_theory_says():
    ours, theirs = make_measurement(0, 0.6, spread=0.1), make_measurement(0, 0.6, spread=0.0)

    difference = compare(ours, theirs)["point/iou"]

    values = np.array([score.iou for score in ours.prompted["point"]])
    expected = 2 * 1.96 * values.std() / np.sqrt(COUNT)
    assert difference.high - difference.low == pytest.approx(expected, rel=0.2)


def test_the_same_draws_every_time():
    ours, theirs = make_measurement(0, 0.7), make_measurement(3, 0.6)

    assert compare(ours, theirs) == compare(ours, theirs)


def test_only_what_both_measured_is_compared():
    differences = compare(make_measurement(0, 0.7), make_measurement(0, 0.6, has_generator=False))

    assert set(differences) == {"point/iou", "point/dice", "point/best_iou", "point/boundary_iou"}


def test_each_image_has_a_row():
    measurement = make_measurement(0, 0.7)
    measurement.found[4] = Detections([], [])

    rows = measurement.list_images()

    assert len(rows) == COUNT
    assert rows[3]["point/iou"] == pytest.approx(measurement.prompted["point"][3].iou)
    assert (rows[3]["generator/ap"], rows[4]["generator/ap"], rows[4]["generator/masks"]) == (pytest.approx(1), 0, 0)


def test_counts_of_an_image_stand_in_its_row_and_their_error_among_the_figures():
    measurement = make_measurement(0, 0.7)
    rles = [make_rle(10), make_rle(11), make_rle(38)]  # the object, again, and nothing
    measurement.found[0] = Detections(rles, [0.9, 0.8, 0.7])
    measurement.found[1] = Detections([], [])

    rows = measurement.list_images()

    names = ("labelled", "found", "missed", "invented", "duplicates", "fragments", "merged", "split")
    assert [rows[0][f"counting/{name}"] for name in names] == [1, 1, 0, 1, 1, 0, 0, 0]
    assert [rows[1][f"counting/{name}"] for name in names] == [1, 0, 1, 0, 0, 0, 0, 0]
    assert measurement.figures["counting/mean_absolute_error"] == pytest.approx(3 / COUNT)
    assert measurement.figures["counting/relative_error"] == pytest.approx(3 / COUNT)
    difference = compare(measurement, make_measurement(0, 0.7))["counting/mean_absolute_error"]
    assert difference.value == pytest.approx(3 / COUNT) and difference.low < difference.value < difference.high


@pytest.mark.parametrize("count", [1, 4, 5])
def test_an_interval_needs_five_images(count):
    ids = {100 + number for number in range(count)}

    differences = compare(make_measurement(0, 0.7).keep(ids), make_measurement(2, 0.6).keep(ids))

    assert differences
    for difference in differences.values():
        assert (difference.low is None, difference.high is None) == (count < 5, count < 5)
