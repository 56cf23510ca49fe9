"""Figures of label maps against masks counted one class at a time."""

import numpy as np
import pytest

from finestsam.data.semantic import IGNORED
from finestsam.evaluation.semantic_scores import count_pixels, describe_classes, summarize_pixels

NAMES = ["background", "wall", "roof", "tree"]


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    truth = draw.integers(-1, 3, (20, 30)).astype(np.int16)  # no tree anywhere
    return truth, np.where(draw.random(truth.shape) < 0.6, truth.clip(0), draw.integers(0, 3, truth.shape))


def test_figures_are_those_of_each_class_alone(pair):
    truth, predicted = pair
    counted = truth != IGNORED

    figures = summarize_pixels(count_pixels(truth, predicted, 4), NAMES)

    ious = []
    for number, name in enumerate(NAMES[:3]):
        one, other = (truth == number) & counted, (predicted == number) & counted
        ious.append((one & other).sum() / (one | other).sum())
        assert figures[f"iou/{name}"] == pytest.approx(ious[-1])
        assert figures[f"dice/{name}"] == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))
    assert figures["miou"] == pytest.approx(np.mean(ious))
    assert figures["pixel_accuracy"] == pytest.approx((truth == predicted)[counted].mean())
    assert "iou/tree" not in figures


def test_a_class_that_is_only_in_the_outputs_counts_as_missed():
    truth, predicted = np.zeros((2, 4), dtype=np.int16), np.array([[0, 0, 0, 3]] * 2)

    figures = summarize_pixels(count_pixels(truth, predicted, 4), NAMES)

    assert figures["iou/tree"] == 0
    assert figures["miou"] == pytest.approx(0.75 / 2)


def test_images_add_up(pair):
    truth, predicted = pair

    whole = count_pixels(truth, predicted, 4)
    halves = count_pixels(truth[:9], predicted[:9], 4) + count_pixels(truth[9:], predicted[9:], 4)

    assert (whole == halves).all()
    assert whole.sum() == (truth != IGNORED).sum()


def test_nothing_to_count_has_no_figures():
    truth = np.full((3, 3), IGNORED, dtype=np.int16)

    assert summarize_pixels(count_pixels(truth, np.zeros((3, 3), dtype=int), 4), NAMES) == {}


def test_classes_are_listed_best_first_and_the_background_last():
    figures = {"iou/background": 0.9, "iou/wall": 0.2, "iou/roof": 0.5}
    figures |= {name.replace("iou", "dice"): value for name, value in figures.items()}

    assert [line.split()[0] for line in describe_classes(figures)] == ["roof", "wall", "background"]
