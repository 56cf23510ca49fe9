"""Which weights of a run are the best."""

from types import SimpleNamespace

import pytest

from finestsam.config import build_config
from finestsam.training.best import keep_if_best
from finestsam.training.run import Progress
from finestsam.training.step import Stepper

BASELINE = {"val_per_mask_iou": 0.2, "val_generator_ar_100": 0.5, "val_generator_ap": 0.1}
BEST = {"val_per_mask_iou": 0.3, "val_generator_ar_100": 0.6, "val_generator_ap": 0.2}


def continue_run(metrics: dict[str, float], **settings: object) -> SimpleNamespace:
    """Return a run that is continued with these settings and has just been validated."""
    return SimpleNamespace(
        config=build_config(settings),
        stepper=SimpleNamespace(metric=Stepper.metric, default_metrics=Stepper.default_metrics),
        progress=Progress(baseline=BASELINE, best=BEST, metrics=metrics),
        val_loader=object(),
        is_first_rank=False,
    )


@pytest.mark.parametrize(("found", "is_better"), [(0.3, True), (0.15, False)])
def test_a_run_that_is_continued_with_another_metric_compares_by_that_one(found, is_better):
    metrics = {"val_per_mask_iou": 0.3, "val_generator_ar_100": 0.55, "val_generator_ap": found}
    run = continue_run(metrics, best_metric="val_generator_ap")

    assert keep_if_best(run) is is_better
    assert run.progress.best == (metrics if is_better else BEST)


@pytest.mark.parametrize(("found", "is_better"), [(0.4, True), (0.25, False)])
def test_a_run_that_is_continued_without_the_generator_compares_masks(found, is_better):
    run = continue_run({"val_per_mask_iou": found}, **{"evaluate.generator": False})

    assert keep_if_best(run) is is_better
