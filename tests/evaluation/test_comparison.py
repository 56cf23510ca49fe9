from dataclasses import replace

import numpy as np
import pytest

from finestsam.config import build_config
from finestsam.evaluation.coco_scores import Detections
from finestsam.evaluation.comparison import LINE_PIXELS, MARGIN_PIXELS, PANEL_PIXELS, render_comparison, shrink_rle
from finestsam.evaluation.measurement import Measurement
from finestsam.evaluation.result import Evaluation
from finestsam.masks import decode_rle, encode_mask

SIDE = PANEL_PIXELS + MARGIN_PIXELS


def find(record, share: float) -> Detections:
    """Return the masks of the first objects of an image, as if a model had found these."""
    kept = record.annotations[: round(share * len(record.annotations))]
    return Detections([record.rle(annotation) for annotation in kept], [0.9] * len(kept))


def make_measurement(records, shares) -> Measurement:
    found = [find(record, share) for record, share in zip(records, shares, strict=True)]
    return Measurement(records, found)


@pytest.fixture
def evaluation(records) -> Evaluation:
    shares = np.linspace(0.2, 1, len(records))
    return Evaluation("after", make_measurement(records, shares), "before", make_measurement(records, shares * 0))


def test_images_are_rated_by_what_is_found_of_them(evaluation, records):
    assert list(evaluation.ratings) == list(range(len(records)))
    assert evaluation.ratings[len(records) - 1].f1 == pytest.approx(1, abs=0.1)
    assert evaluation.ratings[0].recall < 0.3


def test_rows_go_from_the_best_to_the_worst_and_columns_from_image_to_result(evaluation, records):
    image = render_comparison(evaluation, build_config({"opacity": 1.0}))

    height = SIDE + 2 * LINE_PIXELS
    assert image.shape == (3 * height, 4 * SIDE, 3)
    panels = image.reshape(3, height, 4, SIDE, 3).swapaxes(1, 2).astype(int)
    titles, panels = panels[:, :, :LINE_PIXELS], panels[:, :, LINE_PIXELS : LINE_PIXELS + SIDE]
    for column in range(4):  # every panel has a title, each column its own
        assert (titles[0, column] < 100).any() and np.array_equal(titles[0, column], titles[2, column])
        assert column == 0 or not np.array_equal(titles[0, column], titles[0, column - 1])
    changed = [[(panels[row, column] != panels[row, 0]).any(axis=-1).mean() for column in range(4)] for row in range(3)]
    for row in changed:
        assert row[2] == 0  # the baseline found nothing
        assert row[1] > 0
    assert np.array_equal(panels[0, 1], panels[0, 3])  # the best image, of which all is found
    assert changed[0][3] > 0
    assert not np.array_equal(panels[2, 1], panels[2, 3])


def test_the_baseline_with_other_thresholds_is_a_column_of_its_own(evaluation, records):
    more = replace(evaluation, sam_thresholds=make_measurement(records, np.ones(len(records))))

    five, four = (render_comparison(one, build_config({})) for one in (more, evaluation))

    assert five.shape[1] == 5 * SIDE
    assert np.array_equal(five[:, 3 * SIDE :], four[:, 2 * SIDE :])  # what is compared stays side by side


def test_without_a_model_to_compare_with_there_are_three_columns(evaluation):
    alone = render_comparison(Evaluation("after", evaluation.ours), build_config({}))

    assert alone.shape[1] == 3 * SIDE


def test_without_masks_or_without_images_there_is_nothing_to_draw(records):
    assert render_comparison(Evaluation("x", Measurement(records, None)), build_config({})) is None
    assert render_comparison(Evaluation("x", Measurement([], [])), build_config({})) is None


def test_a_mask_keeps_its_place_at_another_size():
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 30:60] = True

    small = decode_rle(shrink_rle(encode_mask(mask), (20, 30)))

    expected = np.zeros((20, 30), dtype=bool)
    expected[5:10, 15:30] = True
    assert np.array_equal(small, expected)
