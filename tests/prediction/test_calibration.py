"""Scores as they are written: no predicted IoU is above 1, and the ranking stays."""

import numpy as np

from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig
from finestsam.evaluation.prompt_scores import ObjectScore, summarize_scores
from finestsam.masks import encode_mask
from finestsam.prediction.results import HIGH_SCORE, FilterReport, GeneratedMasks, Results, bound_scores


def test_bounded_scores_keep_their_order_and_their_values():
    scores = np.sort(np.float32(np.random.default_rng(0).uniform(-0.1, 1.1, 2000)))

    bounded = bound_scores(scores)

    assert bounded.max() < 1 and (np.diff(bounded)[np.diff(scores) > 0] > 0).all()
    assert (bounded[scores <= HIGH_SCORE] == scores[scores <= HIGH_SCORE]).all()
    np.testing.assert_allclose(bounded, np.minimum(scores, 1), atol=0.001)


def make_masks(scores: list[float]) -> GeneratedMasks:
    count = len(scores)
    rles = [encode_mask(np.ones((4, 6), dtype=bool))] * count
    boxes = np.tile([[0, 0, 6, 4]], (count, 1))
    return GeneratedMasks(
        rles, boxes, np.float32(scores), np.ones(count), np.float32(scores), np.full(count, 24),
        np.zeros((count, 2)), boxes, np.zeros((count, 0)),
    )  # fmt: skip


def test_no_predicted_iou_above_1_is_written_and_the_ranking_stays():
    results = Results({1: "object"}, GeneratorConfig(**GENERATOR_DEFAULTS))

    entry = results.add("a.png", (4, 6), make_masks([1.0499, 1.0498, 1.01, 1.0, 0.98]))

    scores = [one["score"] for one in entry["annotations"]]
    assert [one["predicted_iou"] for one in entry["annotations"]] == [1, 1, 1, 1, 0.98]
    assert scores == sorted(set(scores), reverse=True) and scores[0] < 1


def test_no_predicted_iou_above_1_is_reported():
    report = FilterReport(candidates=3, low_score=3, best_score=1.04)
    scores = [ObjectScore(1, place, 0.5, 0.5, 0.5, 0.5, 1.2) for place in range(2)]

    assert "(best 1.000)" in report.explain_no_masks(GeneratorConfig(**GENERATOR_DEFAULTS))
    assert summarize_scores(scores)["score"] == 1
