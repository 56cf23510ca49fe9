from pathlib import Path

import pytest
from conftest import run_evaluation, run_training

from finestsam.evaluation.charts import plot_history
from finestsam.evaluation.own_run import History, read_history
from finestsam.model.card import Card
from finestsam.model.load import LoadedModel

TABLE = "epoch,step,total_loss,val_per_mask_iou\n0,0,,0.1\n1,4,0.9,\n2,8,0.7,0.3\n"


def load(folder: Path, step: int = 8, has_card: bool = True) -> LoadedModel:
    card = Card("vit_tiny_test", 64, True, [], step=step) if has_card else None
    return LoadedModel(None, "vit_tiny_test", card, "best.pth", folder / "best.pth")


def test_a_run_is_reported_epoch_by_epoch_with_the_one_that_the_weights_are_of(tmp_path):
    (tmp_path / "metrics.csv").write_text(TABLE)

    history = read_history(load(tmp_path))

    assert history.trace("total_loss") == ([1, 2], [0.9, 0.7])
    assert history.trace("val_per_mask_iou") == ([0, 2], [0.1, 0.3])
    assert history.trace("val_generator_ap") == ([], [])
    assert history.kept_epoch == 2
    assert read_history(load(tmp_path, step=5)).kept_epoch is None


def test_weights_outside_a_run_have_no_history(tmp_path):
    assert read_history(load(tmp_path)) is None
    (tmp_path / "metrics.csv").write_text(TABLE)
    assert read_history(load(tmp_path, has_card=False)) is None


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n", "epoch,step\n1,x\n", "epoch,step\n,1\n", "epoch\n1,2\n", "epoch,step\n1,1e308\n",
        "epoch,step\n1,-inf\n",
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_reported_and_left_out(tmp_path, capsys, text):
    (tmp_path / "metrics.csv").write_text(text)

    assert read_history(load(tmp_path)) is None
    assert "no training curves" in capsys.readouterr().err


def test_what_was_not_measured_is_not_drawn():
    both = plot_history(History([{"epoch": 0, "val_per_mask_iou": 0.1}, {"epoch": 1, "total_loss": 0.5}]))
    assert len(both) == 2 and all(chart.startswith("<svg") for chart in both)
    (loss,) = plot_history(History([{"epoch": 1, "total_loss": 0.5}], kept_epoch=1))
    assert "<!-- 1 -->" in loss and "<!-- 1.000 -->" not in loss  # epochs are whole, of a single one as well
    assert plot_history(History([])) == []


def test_the_report_of_a_run_shows_how_it_was_learnt(scenes, tmp_path):
    run = run_training(scenes, tmp_path / "sav", "--evaluate.generator=false", "--num_epochs=1")
    quick = ["--evaluate.clicks=0", "--evaluate.generator=false"]

    run_evaluation(scenes, tmp_path / "run", f"--model.checkpoint={run}", "--model.type=auto", *quick)
    run_evaluation(scenes, tmp_path / "nothing", *quick)

    # Text in matplotlib's SVG is outlines, with the text itself as a comment.
    assert "<!-- Training: loss -->" in (tmp_path / "run" / "report.html").read_text()
    assert "<!-- Training: loss -->" not in (tmp_path / "nothing" / "report.html").read_text()
