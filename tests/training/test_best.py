"""Which weights of a run are the best."""

from types import SimpleNamespace

import pytest

from finestsam.config import build_config
from finestsam.tasks.base import Validation
from finestsam.tasks.masks import MasksTask
from finestsam.training.best import keep_if_best
from finestsam.training.state import Progress, RunState

BASELINE = {"val_per_mask_iou": 0.2, "val_generator_ar_100": 0.5, "val_generator_ap": 0.1}
BEST = {"val_per_mask_iou": 0.3, "val_generator_ar_100": 0.6, "val_generator_ap": 0.2}


def continue_run(**settings: object) -> SimpleNamespace:
    """Return a run that is continued with these settings."""
    return SimpleNamespace(
        config=build_config(settings),
        task=MasksTask,
        val_loader=object(),
        is_first_rank=False,
    )


def continue_state() -> RunState:
    return RunState(None, None, None, None, Progress(baseline=BASELINE, best=BEST))


@pytest.mark.parametrize(("found", "is_better"), [(0.3, True), (0.15, False)])
def test_a_run_that_is_continued_with_another_metric_compares_by_that_one(found, is_better):
    metrics = {"val_per_mask_iou": 0.3, "val_generator_ar_100": 0.55, "val_generator_ap": found}
    run, state = continue_run(best_metric="val_generator_ap"), continue_state()

    assert keep_if_best(run, state, None, Validation(metrics)) is is_better
    assert state.progress.best == (metrics if is_better else BEST)


@pytest.mark.parametrize(("found", "is_better"), [(0.4, True), (0.25, False)])
def test_a_run_that_is_continued_without_the_generator_compares_masks(found, is_better):
    run, validation = continue_run(**{"evaluate.generator": False}), Validation({"val_per_mask_iou": found})

    assert keep_if_best(run, continue_state(), None, validation) is is_better
