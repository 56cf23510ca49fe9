import csv
from pathlib import Path

import pytest

from finestsam.config import build_config
from finestsam.errors import UserError
from finestsam.tasks.classes import ClassesTask
from finestsam.tasks.masks import MasksTask
from finestsam.training.log import RunLog, describe_epoch, list_columns, read_metrics

TASK = MasksTask(build_config({}), None)
COLUMNS = list_columns(TASK)

KNOWN = {"val_per_mask_iou": 0.21}
BASELINE = {"epoch": 0, "step": 0, "val_per_mask_iou": 0.21, "val_per_mask_dice": 0.3, "val_best_iou": 0.4}


def make_row(epoch: int, **others: float | None) -> dict[str, float | None]:
    row = {name: epoch + place / 16 for place, name in enumerate(COLUMNS)}
    return row | {"epoch": epoch, "step": 10 * epoch} | others


def read_text(folder: Path) -> str:
    return (folder / "metrics.csv").read_text()


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_every_epoch_has_a_row_and_the_unchanged_model_only_its_validation(tmp_path):
    log = RunLog(tmp_path, TASK)
    log.log_epoch(BASELINE)
    log.log_epoch(make_row(1, learning_rate=4e-05, step=1234567))
    with (tmp_path / "metrics.csv").open() as file:
        header, first, second = csv.reader(file)
    assert ",".join(header) == (
        "epoch,step,seconds,validation_seconds,learning_rate,total_loss,focal_loss,dice_loss,iou_loss,iou,predicted_iou,"
        "val_per_mask_iou,val_per_mask_dice,val_best_iou,val_boundary_iou,"
        "val_generator_ap,val_generator_ap50,val_generator_ap75,val_generator_ar_10,val_generator_ar_100,"
        "val_generator_ar_1000,val_generator_ap_small,val_generator_ap_medium,val_generator_ap_large,"
        "val_generator_ar_1000_small,val_generator_ar_1000_medium,val_generator_ar_1000_large,val_generator_f1,"
        "val_generator_masks,val_generator_objects"
    )
    assert first == ["0", "0"] + [""] * 9 + ["0.21", "0.3", "0.4"] + [""] * 16
    assert second[:6] == ["1", "1234567", "1.125", "1.1875", "4e-05", "1.3125"]


def test_the_row_of_an_epoch_is_on_the_disk_as_soon_as_it_is_logged(tmp_path):
    log = RunLog(tmp_path, TASK)
    for epoch in (1, 2, 3):
        log.log_epoch(make_row(epoch))
        assert (
            read_metrics(tmp_path / "metrics.csv", COLUMNS)
            == log.read_rows()
            == [make_row(e) for e in range(1, epoch + 1)]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "tensorboard"]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_an_empty_field(tmp_path, value):
    log = RunLog(tmp_path, TASK)
    log.log_step(1, {"total_loss": value})
    log.log_epoch(make_row(1, total_loss=value, val_per_mask_iou=value))
    log.close()
    assert "nan" not in read_text(tmp_path) and "inf" not in read_text(tmp_path)
    assert log.read_rows()[0]["total_loss"] is None
    assert read_metrics(log.path, COLUMNS)[0]["val_per_mask_iou"] is None
    assert "train/total_loss" not in read_scalars(tmp_path)


@pytest.mark.parametrize("resumed_epoch", [0, 2, 3])
def test_a_resumed_run_loses_and_doubles_no_row(tmp_path, resumed_epoch):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    broken.mkdir()
    rows = [BASELINE, *(make_row(epoch, iou=1 / (epoch + 2)) for epoch in range(1, 6))]
    log = RunLog(unbroken, TASK)
    for row in rows:
        log.log_epoch(row)

    log = RunLog(broken, TASK)
    for row in rows[:4]:
        log.log_epoch(row)
    resumed = RunLog(broken, TASK, resumed_epoch)
    assert [row["epoch"] for row in read_metrics(resumed.path, COLUMNS)] == list(range(resumed_epoch + 1))
    for row in rows[resumed_epoch + 1 :]:
        resumed.log_epoch(row)

    assert read_text(broken) == read_text(unbroken)


def test_an_epoch_that_is_logged_again_has_one_row(tmp_path):
    log = RunLog(tmp_path, TASK)
    log.log_epoch(make_row(1))
    log.log_epoch(make_row(2, step=15))
    log.log_epoch(make_row(2))
    assert read_metrics(log.path, COLUMNS) == [make_row(1), make_row(2)]


def test_a_new_run_begins_an_empty_table_and_a_run_without_one_can_be_resumed(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch\n7\n")
    log = RunLog(tmp_path, TASK)
    log.log_epoch(make_row(1))
    assert read_metrics(log.path, COLUMNS) == [make_row(1)]
    log.path.unlink()
    assert RunLog(tmp_path, TASK, resumed_epoch=1).read_rows() == []


def test_columns_that_a_table_lacks_are_empty(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,iou\n1,2,0.5\n")

    assert read_metrics(tmp_path / "metrics.csv", COLUMNS) == [
        dict.fromkeys(COLUMNS) | {"epoch": 1, "step": 2, "iou": 0.5}
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n",
        ",".join(COLUMNS) + "\n1,2,x\n",
        ",".join(COLUMNS) + "\n,2\n",
        "\xff\n1",
        "epoch,step,iou\n1,2,1e308\n",
        "epoch,step,iou\n1,2,nan\n",
        f"epoch,step\n{'9' * 400},2\n",
    ],  # fmt: skip
)
def test_a_table_that_was_changed_by_hand_is_named(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(
        UserError, match="metrics.csv: not as finestsam wrote it .*; move it away to continue without it"
    ):
        RunLog(tmp_path, TASK, resumed_epoch=1)


def test_a_column_that_nobody_knows_is_our_own_bug(tmp_path):
    with pytest.raises(AssertionError, match="no columns .'accuracy'"):
        RunLog(tmp_path, TASK).log_epoch({"epoch": 1, "step": 2, "accuracy": 1.0})


def test_a_table_that_cannot_be_written_is_reported_once_and_written_later(tmp_path, capsys):
    log = RunLog(tmp_path, TASK)
    log.path.mkdir()
    log.log_epoch(make_row(1))
    log.log_epoch(make_row(2))
    assert capsys.readouterr().err == f"warning: {log.path} not written: Is a directory\n"
    log.path.rmdir()
    log.log_epoch(make_row(3))
    assert read_metrics(log.path, COLUMNS) == [make_row(epoch) for epoch in (1, 2, 3)]


def test_tensorboard_has_the_losses_of_steps_and_the_validation_of_epochs(tmp_path):
    log = RunLog(tmp_path, TASK)
    for step in (1, 2):
        log.log_step(step, {"total_loss": 1 / step, "learning_rate": 0.5})
    log.log_epoch(make_row(1, step=2))
    scalars = read_scalars(tmp_path)  # not closed yet: an epoch is flushed
    assert scalars["train/total_loss"] == [(1, 1.0), (2, 0.5)]
    assert scalars["train/learning_rate"] == [(1, 0.5), (2, 0.5)]
    assert scalars["validation/val_per_mask_iou"] == [(2, make_row(1)["val_per_mask_iou"])]
    assert len(scalars) == 21


def test_tensorboard_shows_no_step_of_a_resumed_run_twice(tmp_path):
    log = RunLog(tmp_path, TASK)
    for step in (1, 2, 3):
        log.log_step(step, {"total_loss": float(step)})
    log.close()
    resumed = RunLog(tmp_path, TASK, resumed_epoch=0)
    resumed.log_step(2, {"total_loss": 20.0})
    resumed.close()
    assert read_scalars(tmp_path)["train/total_loss"] == [(1, 1.0), (2, 20.0)]


def test_a_broken_tensorboard_is_reported_once_and_the_table_goes_on(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()  # a file where its folder should be
    log = RunLog(tmp_path, TASK)
    for epoch in (1, 2):
        log.log_step(epoch, {"total_loss": 1.0})
        log.log_epoch(make_row(epoch))
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {tmp_path / 'tensorboard'} not written: ")
    assert error.count("\n") == 1
    assert len(read_metrics(log.path, COLUMNS)) == 2


def test_without_tensorboard_the_log_is_silent(tmp_path, monkeypatch, capsys):
    for package in ("TENSORBOARD", "TENSORBOARDX"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard._{package}_AVAILABLE", False)
    log = RunLog(tmp_path, TASK)
    log.log_step(1, {"total_loss": 1.0})
    log.log_epoch(BASELINE)
    log.close()
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_epoch_and_its_validation_are_said_beside_the_baseline(tmp_path, capsys):
    row = {"total_loss": 0.4123, "iou": 0.607, "val_per_mask_iou": 0.58, "learning_rate": 4e-5, "seconds": 12.345}
    row |= {"val_generator_ap": 0.44, "val_generator_masks": 7.25, "val_generator_objects": 6.9}
    RunLog(tmp_path, TASK, num_epochs=30).log_epoch(
        {"epoch": 3, "step": 108, "validation_seconds": 6.0, **row},
        baseline={"val_per_mask_iou": 0.21, "val_generator_ap": 0.1, "val_generator_masks": 20},
    )
    assert capsys.readouterr().out.splitlines() == [
        "epoch 3/30 step 108 loss 0.412 iou 0.61 lr 4.0e-05 12.3 s",
        "  validation (baseline): point IoU 0.58 (0.21), AP 0.440 (0.100), 7.2 masks an image (20.0), "
        "which has 6.9 objects; 6.0 s",
    ]


@pytest.mark.parametrize(
    ("row", "baseline", "line"),
    [
        (BASELINE, KNOWN, "baseline, the weights that training starts from: point IoU 0.21"),
        ({"epoch": 1, "step": 2, "total_loss": 1.0}, KNOWN, "epoch 1 step 2 loss 1.000"),
        (
            {"epoch": 1, "step": 2, "val_per_mask_iou": 0.1},
            KNOWN,
            "epoch 1 step 2\n  validation (baseline): point IoU 0.10 (0.21)",
        ),
        ({"epoch": 1, "step": 2, "val_per_mask_iou": 0.1}, None, "epoch 1 step 2\n  validation: point IoU 0.10"),
    ],
)
def test_the_lines_of_an_epoch_lack_what_was_not_measured(row, baseline, line):
    assert describe_epoch(dict.fromkeys(COLUMNS) | row, ClassesTask.printed, baseline=baseline) == line
