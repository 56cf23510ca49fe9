import numpy as np
import pytest
import torch
from conftest import run_evaluation

from finestsam.config import build_config
from finestsam.data.dataset import SampleDataset, SampleSettings, collate
from finestsam.evaluation.measurement import Measurement, compare
from finestsam.evaluation.prompt_scorer import BackgroundScores, measure_background, summarize_background
from finestsam.prediction.embedder import Embedder


@pytest.fixture
def samples(records):
    config = build_config({"dataset.background_points": 7, "prompts.use_boxes": False})
    dataset = SampleDataset(records, SampleSettings(64, 16, 0, config.prompts, config.dataset))
    return [dataset[(0, place)] for place in range(3)]


@pytest.mark.parametrize("chunk_objects", [1, 3, 100])
def test_a_point_has_the_best_score_that_the_model_gives_there(tiny_sam, samples, chunk_objects):
    found = measure_background(Embedder(tiny_sam), [collate(samples)], chunk_objects, pred_iou_thresh=0.0)

    for one, sample in zip(found, samples, strict=True):
        with torch.no_grad():
            expected = tiny_sam(tiny_sam.encode([sample.image]), sample.background).scores.max(dim=1).values
        assert one.image_id == sample.image_id
        np.testing.assert_allclose(one.scores, expected.numpy(), atol=1e-5)
        assert one.is_taken.all()  # a threshold of 0 lets every number pass, below 0 too


def test_the_generators_threshold_shows_what_it_would_take(tiny_sam, samples):
    embedder = Embedder(tiny_sam)
    (one, *_) = measure_background(embedder, [collate(samples)], 100, pred_iou_thresh=0.0)
    middle = float(np.median(one.scores))

    (again, *_) = measure_background(embedder, [collate(samples)], 100, pred_iou_thresh=middle)

    assert 0 < again.is_taken.sum() == (one.scores > middle).sum() < len(one.scores)


def test_figures_are_means_over_points_and_differ_with_an_interval(records):
    def measure(shift: float) -> Measurement:
        noise = np.random.default_rng(0)
        scores = [noise.uniform(0, 0.5, 4 + place) + shift for place in range(len(records))]
        found = [BackgroundScores(record.image_id, one, one > 0.6) for record, one in zip(records, scores, strict=True)]
        return Measurement(records, None, background=found)

    ours, theirs = measure(0.0), measure(0.3)

    everything = np.concatenate([one.scores for one in theirs.background])
    assert theirs.figures["background/score"] == pytest.approx(everything.mean())
    assert theirs.figures["background/taken_share"] == pytest.approx((everything > 0.6).mean())
    assert theirs.figures["background/points"] == len(everything)
    difference = compare(ours, theirs)["background/score"]
    assert difference.value == pytest.approx(-0.3)
    assert difference.low == pytest.approx(-0.3) == difference.high  # the same points are hard for both
    assert theirs.list_images()[2]["background/score"] == pytest.approx(theirs.background[2].scores.mean())
    assert summarize_background([]) == {}


def test_the_command_prompts_the_background(scenes, tmp_path):
    quick = ["--evaluate.clicks=0", "--evaluate.generator=false"]
    figures = run_evaluation(scenes, tmp_path / "out", *quick, "--generator.points_per_side=16")

    assert figures["background/points"] == 32  # of one image, a tenth of six
    assert 0 <= figures["background/taken_share"] <= 1
