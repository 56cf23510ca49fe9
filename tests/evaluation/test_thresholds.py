"""The search of the generator's settings: what it selects is what the generator gives, and what it finds is best."""

import copy
import dataclasses

import numpy as np
import pytest

from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig, ImagesConfig
from finestsam.evaluation import candidates as candidates_module
from finestsam.evaluation.candidates import Candidates, find_candidates, match, select
from finestsam.evaluation.coco_scores import CocoScorer, Detections
from finestsam.evaluation.generator_scores import tune
from finestsam.evaluation.thresholds import IOU_THRESHOLDS, calibrate, measure_operating_point, search
from finestsam.images.files import read_image
from finestsam.masks import encode_mask
from finestsam.prediction.embedder import Embedder
from finestsam.prediction.generator import generate_masks
from finestsam.prediction.results import GeneratedMasks, correct_scores
from finestsam.records import Record

START = GeneratorConfig(**GENERATOR_DEFAULTS | {"points_per_side": 6})


def make_candidates(scores, ious, **changes) -> Candidates:
    """Return candidates that overlap nobody, of known scores and IoUs (K x G)."""
    count = len(scores)
    positions = np.arange(count)[:, None] * 10
    masks = GeneratedMasks(
        rles=[encode_mask(np.ones((2, 2), dtype=bool))] * count,
        boxes_xywh=np.concatenate([positions, positions, np.full((count, 2), 6)], axis=1),
        scores=np.array(scores, dtype=np.float32),
        stability=np.ones(count),
        priorities=np.array(scores, dtype=np.float32),
        areas=np.full(count, 4),
        points=np.zeros((count, 2)),
        crop_boxes_xywh=np.tile([0, 0, 10, 10], (count, 1)),
        class_probabilities=np.zeros((count, 0), dtype=np.float32),
    )
    fields = {
        "masks": masks,
        "ious": np.array(ious, dtype=float),
        "crowd_shares": np.zeros(count),
        "points_per_side": np.full(count, 6),
        "layers": np.zeros(count, dtype=int),
    }
    return Candidates(**fields | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"box_nms_thresh": 0.3},
        {"stability_score_thresh": "median"},
        {"points_per_side": 3},
        {"masks_per_point": "best"},
        {"masks_per_point": "best", "stability_score_thresh": "median", "box_nms_thresh": 0.4},
        {"crop_n_layers": 1, "box_nms_thresh": 0.5},
    ],
)
def test_what_is_selected_is_what_the_generator_gives(tiny_sam, records, changes):
    embedder, images = Embedder(tiny_sam), ImagesConfig()
    open_settings = dataclasses.replace(START, **{"stability_score_thresh": 0.0} | changes)
    kept = ("crop_n_layers", "masks_per_point")
    dump = dataclasses.replace(START, **{name: getattr(open_settings, name) for name in kept})
    found = find_candidates(embedder, records[:2], dump, (3, 6), images, title=None)

    for record, one in zip(records[:2], found, strict=True):
        threshold = float(np.median(one.masks.scores))
        settings = dataclasses.replace(open_settings, pred_iou_thresh=threshold)
        if settings.stability_score_thresh == "median":
            settings = dataclasses.replace(settings, stability_score_thresh=float(np.median(one.masks.stability)))
        pixels = read_image(record.path, record.size, images)
        masks = generate_masks(tiny_sam, pixels, settings)
        chosen = one[select(one, settings)]
        assert 0 < len(chosen) < len(one)
        assert sorted(rle["counts"] for rle in masks.rles) == sorted(rle["counts"] for rle in chosen.masks.rles)
        np.testing.assert_allclose(sorted(masks.scores), sorted(chosen.masks.scores))


def test_only_the_best_candidates_are_worth_a_mask(tiny_sam, records, monkeypatch):
    embedder, images = Embedder(tiny_sam), ImagesConfig()
    (everything,) = find_candidates(embedder, records[:1], START, (12,), images)
    monkeypatch.setitem(candidates_module.MOST_CANDIDATES, "all", 100)

    (some,) = find_candidates(embedder, records[:1], START, (12,), images)

    assert len(everything) == 3 * 12**2
    assert 80 <= len(some) <= 120
    np.testing.assert_array_equal(some.masks.scores, everything.masks.scores[: len(some)])


def test_f1_and_recall_are_those_of_pycocotools(tiny_sam, records):
    embedder, records = Embedder(tiny_sam), copy.deepcopy(records)
    found = find_candidates(embedder, records, START, (6,), ImagesConfig())
    # Truth among the candidates, so that there is something to find.
    for record, one in zip(records, found, strict=True):
        record.annotations[0] = dataclasses.replace(record.annotations[0], counts=one.masks.rles[-1]["counts"])
    found = find_candidates(embedder, records, START, (6,), ImagesConfig())

    result = measure_operating_point(found)
    figures = CocoScorer(records, [Detections(one.masks.rles, one.masks.scores.tolist()) for one in found]).score()

    assert result.f1 == pytest.approx(figures["f1"], abs=1e-12) and result.f1 > 0
    assert result.recall == pytest.approx(figures["ar_1000"], abs=1e-12)


def test_a_mask_takes_the_object_that_it_covers_best_of_those_left():
    ious = np.array([[0.6, 0.9], [0.55, 0.95], [0.7, 0.2]])

    found = match(ious, np.array([0.5, 0.65]))

    # At 0.5 the second is left with the first object; at 0.65 that one is too far from it, and goes to the third.
    assert found.tolist() == [[1, 0, -1], [1, -1, 0]]


def test_the_search_cuts_where_wrong_masks_begin():
    rng = np.random.default_rng(0)
    good, bad = np.sort(rng.uniform(0.7, 0.9, 20)), np.sort(rng.uniform(0.1, 0.6, 60))
    ious = np.zeros((80, 20))
    ious[np.arange(20), np.arange(20)] = 0.97
    scores = np.concatenate([good, bad])
    order = np.argsort(-scores)
    found = [make_candidates(scores[order], ious[order])]

    result = search([None], found, START, frozenset({"min_mask_region_area"}), "f1")

    assert result.after.f1 > 0.97  # the levels tried are not the gap itself
    assert np.quantile(bad, 0.97) < result.settings.pred_iou_thresh < np.quantile(good, 0.05)
    assert result.before.f1 < 1
    with_fixed = search(
        [None], found, START, frozenset({"min_mask_region_area", "pred_iou_thresh", "stability_score_thresh"}), "f1"
    )
    assert with_fixed.settings.pred_iou_thresh == START.pred_iou_thresh


def test_for_partly_labelled_images_a_mask_that_fits_nothing_costs_little():
    scores = np.linspace(0.9, 0.1, 40)
    ious = np.zeros((40, 4))
    ious[[0, 9, 19, 29], [0, 1, 2, 3]] = 0.97
    found = [make_candidates(scores, ious)]
    fixed = frozenset({"min_mask_region_area"})

    strict, lenient = (search([None], found, START, fixed, goal) for goal in ("f1", "recall"))

    assert lenient.after.recall == pytest.approx(1.0)
    assert lenient.after.masks_per_object < 10  # but it does not take those after the last object
    assert strict.after.recall < lenient.after.recall


def test_crowds_are_neither_right_nor_wrong():
    one = make_candidates([0.9, 0.8], [[0.97], [0.0]], crowd_shares=np.array([0.0, 1.0]))

    assert measure_operating_point([one]).f1 == pytest.approx(1.0)


def test_the_map_corrects_scores_that_are_too_high_and_never_turns_their_order():
    rng = np.random.default_rng(1)
    ious = rng.uniform(0, 1, (4000, 1))
    scores = np.sqrt(ious[:, 0]) + rng.normal(0, 0.02, 4000)

    found = calibrate([make_candidates(scores, ious)])

    knots = np.array(found.knots)
    assert (np.diff(knots, axis=0) >= 0).all() and len(knots) <= 16
    corrected = correct_scores(scores, found.knots)
    assert found.error == pytest.approx(np.abs(scores.clip(0, 1) - ious[:, 0]).mean(), abs=0.03)
    assert np.abs(corrected - ious[:, 0]).mean() < 0.05
    assert correct_scores(np.array([0.3]), [])[0] == 0.3


def test_without_candidates_there_is_nothing_to_correct():
    assert calibrate([]) is None
    assert calibrate([make_candidates([], np.zeros((0, 3)))]) is None


@pytest.mark.parametrize("min_area", [None, 40])
def test_tuned_settings_are_reported_by_the_names_of_the_generator_and_give_what_they_promise(
    tiny_sam, records, min_area
):
    embedder, images = Embedder(tiny_sam), ImagesConfig()
    candidates = find_candidates(embedder, records, START, (3, 6), images)
    start = START if min_area is None else dataclasses.replace(START, min_mask_region_area=min_area)
    fixed = frozenset() if min_area is None else frozenset({"min_mask_region_area"})

    tuned = tune(records, candidates, start, fixed, "recall")

    stored = tuned.describe()
    assert set(stored) == set(GENERATOR_DEFAULTS) - {"no_object_thresh"} | {"score_map"}
    settings = dataclasses.replace(START, **{name: stored[name] for name in stored if name != "score_map"})
    for record, found in zip(records, tuned.found, strict=True):
        masks = generate_masks(tiny_sam, read_image(record.path, record.size, images), settings)
        assert sorted(rle["counts"] for rle in masks.rles) == sorted(rle["counts"] for rle in found.rles)
    figures = tuned.measure(records)
    assert {"ap", "ar_1000", "f1", "masks_per_image", "calibration_error"} <= set(figures)


def test_images_without_objects_and_without_candidates_are_measured():
    record = Record(1, "a.png", None, (2, 2), [])
    assert measure_operating_point([make_candidates([0.5], np.zeros((1, 0)))]).f1 == 0
    nothing = make_candidates([], np.zeros((0, 1)))
    assert match(nothing.ious, IOU_THRESHOLDS).shape == (10, 0)
    result = search([record], [nothing], START, frozenset(), "recall")
    assert result.settings.points_per_side == 6
