"""What a run keeps when a signal, a full disk, another process or an error of our own ends it."""

import csv
import json
import math
import os
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FROM_SCRATCH, read_only, run_training

from finestsam.cli import main
from finestsam.model import saving
from finestsam.runtime.signals import WATCHED
from finestsam.tasks import masks
from finestsam.training import checkpoint, numbers, setup, train
from finestsam.training import time_budget as pace
from finestsam.training.run_folder import lock_run

FLAGS = ["--num_epochs=2", "--dataset.val_size=0.4", "--generator.points_per_side=4"]


@pytest.fixture(autouse=True)
def countable(monkeypatch):
    """Save after every epoch, however short, and take no step that is not of the training: tests count them."""
    monkeypatch.setattr(pace, "SHARE", math.inf)
    monkeypatch.setattr(setup, "measure_need", lambda *_: None)


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory) -> Path:
    return run_training(scenes, tmp_path_factory.mktemp("sav"), "--run_name=whole", *FLAGS)


def start(scenes: Path, folder: Path, *flags: str) -> int:
    arguments = ["--mode=train", f"--dataset={scenes}", "--model.type=vit_tiny_test", f"--sav_dir={folder}"]
    return main([*arguments, "--device=cpu", "--num_workers=0", "--run_name=run", *FROM_SCRATCH, *FLAGS, *flags])


def resume(folder: Path, *flags: str) -> int:
    return main(["--mode=train", f"--resume={folder / 'run'}", *flags])


def read_rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [
            {name: value for name, value in row.items() if not name.endswith("seconds")} for row in csv.DictReader(file)
        ]


def assert_same_run(one: Path, other: Path) -> None:
    first, second = (torch.load(run / "last.ckpt", weights_only=True) for run in (one, other))
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, rtol=0, atol=0)
    moments = [state["optimizer"]["state"] for state in (first, second)]
    for number, values in moments[0].items():
        for name, value in values.items():
            torch.testing.assert_close(moments[1][number][name], value, rtol=0, atol=0)
    assert read_rows(one) == read_rows(other)
    best = [torch.load(run / "best.pth", weights_only=True) for run in (one, other)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def send_at_call(monkeypatch, place: str, call: int, number: int) -> None:
    """Let a signal come to this process when a function is called for the n-th time."""
    module, _, name = place.rpartition(".")
    target = __import__(module, fromlist=[name])
    function, calls = getattr(target, name), []

    def called(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    monkeypatch.setattr(target, name, called)


TRAIN, VALIDATION = "finestsam.training.train.", "finestsam.tasks.masks."


@pytest.mark.parametrize(
    ("place", "call", "number"),
    [
        pytest.param(VALIDATION + "score_batches", 1, signal.SIGINT, marks=pytest.mark.slow),
        (VALIDATION + "find_candidates", 1, signal.SIGTERM),
        (TRAIN + "_count_step", 2, signal.SIGUSR1),
        pytest.param(VALIDATION + "score_batches", 2, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(VALIDATION + "find_candidates", 2, signal.SIGINT, marks=pytest.mark.slow),
        (VALIDATION + "tune", 3, signal.SIGTERM),
        (TRAIN + "save_last", 2, signal.SIGINT),
    ],
    ids=[
        "baseline", "baseline's generator", "step", "validation", "validation's generator", "last validation", "saving",
    ],
)  # fmt: skip
def test_a_signal_at_any_place_of_a_run_loses_nothing(
    scenes, whole, tmp_path, monkeypatch, capsys, place, call, number
):
    handlers = [signal.getsignal(one) for one in WATCHED]
    send_at_call(monkeypatch, place, call, number)

    code = start(scenes, tmp_path)

    out, error = capsys.readouterr()
    assert code == 128 + number
    assert "to go on: --mode train --resume" in out
    assert "Traceback" not in error
    assert [signal.getsignal(one) for one in WATCHED] == handlers
    monkeypatch.undo()
    assert resume(tmp_path) == 0
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "place",
    ["finestsam.data.read.assemble", "finestsam.training.setup.load_model", "finestsam.training.setup.encode_missing"],
    ids=["dataset check", "weights", "embedding store"],
)
def test_a_signal_before_the_first_step_ends_at_once_and_the_run_can_begin_again(scenes, tmp_path, monkeypatch, place):
    frozen = "--model_layer.freeze.image_encoder=true"
    send_at_call(monkeypatch, place, 1, signal.SIGTERM)
    assert start(scenes, tmp_path, frozen) == 143
    monkeypatch.undo()
    assert not (tmp_path / "run" / "last.ckpt").exists()

    again = resume(tmp_path, "--num_epochs=1") if (tmp_path / "run").exists() else start(scenes, tmp_path, frozen)

    assert again == 0
    assert (tmp_path / "run" / "best.pth").is_file()


def test_a_signal_while_original_weights_are_tried_loses_no_try(scenes, tmp_path, monkeypatch, capsys):
    flags = ["--opt.keep_original=auto", "--best_metric=val_per_mask_iou"]
    assert start(scenes, tmp_path / "whole", *flags) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "of the original weights" in line]
    send_at_call(monkeypatch, "finestsam.training.blend.blend", 3, signal.SIGTERM)

    assert start(scenes, tmp_path, *flags) == 143

    assert "stopped while original weights were put back; to go on: --mode train" in capsys.readouterr().out
    monkeypatch.undo()
    assert resume(tmp_path) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "of the original weights" in line] == said
    assert_same_run(tmp_path / "whole" / "run", tmp_path / "run")
    cards = [json.loads((folder / "run" / "best.json").read_text()) for folder in (tmp_path / "whole", tmp_path)]
    assert cards[0] == cards[1]
    assert resume(tmp_path) == 0
    assert "already complete" in capsys.readouterr().out


class FullDisk:
    """Lets the system refuse to write files of more than some bytes from the n-th call of a function on."""

    def __init__(self, monkeypatch, module, name: str, first: int, last: int, limit: int):
        self.calls = 0
        function = getattr(module, name)

        def limited(*arguments, **named):
            self.calls += 1
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            if first <= self.calls <= last:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                return function(*arguments, **named)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        monkeypatch.setattr(module, name, limited)


def test_a_disk_that_is_full_for_a_while_ends_no_run(scenes, whole, tmp_path, monkeypatch, capsys):
    FullDisk(monkeypatch, saving, "_write_verified", first=2, last=3, limit=100_000)

    assert start(scenes, tmp_path) == 0

    assert "warning: checkpoint not saved: File too large" in capsys.readouterr().err
    assert_same_run(whole, tmp_path / "run")


def test_a_last_checkpoint_that_cannot_be_saved_ends_with_one_message_and_the_old_files(
    scenes, whole, tmp_path, monkeypatch, capsys
):
    assert start(scenes, tmp_path, "--max_steps=2") == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("last.ckpt", "best.pth")}
    capsys.readouterr()
    FullDisk(monkeypatch, checkpoint, "save_last", first=1, last=99, limit=100_000)

    assert resume(tmp_path, "--max_steps=0", "--num_epochs=1") == 2

    error = capsys.readouterr().err
    assert error.count("checkpoint not saved") == 1 and "Traceback" not in error
    assert "make room there, then go on with --mode train --resume" in error
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before["last.ckpt"]
    assert not list((tmp_path / "run").glob(".*.tmp"))
    monkeypatch.undo()
    assert resume(tmp_path, "--max_steps=0", "--num_epochs=2") == 0
    assert_same_run(whole, tmp_path / "run")


def test_best_weights_that_could_not_be_saved_are_reported_at_the_end(scenes, tmp_path, monkeypatch, capsys):
    FullDisk(monkeypatch, checkpoint, "save_weights", first=1, last=99, limit=100_000)
    monkeypatch.setattr("finestsam.training.best.save_weights", checkpoint.save_weights)

    assert start(scenes, tmp_path) == 2

    assert "best.pth does not hold the best weights of the run: checkpoint not saved" in capsys.readouterr().err
    assert (tmp_path / "run" / "last.ckpt").is_file()


def test_an_error_of_our_own_is_written_down(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TRAIN + "_count_step", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        start(scenes, tmp_path)

    path = tmp_path / "run" / "crash.txt"
    assert f"stopped by an error of its own; {path} holds what to report" in capsys.readouterr().err
    text = path.read_text()
    assert "ZeroDivisionError: division by zero" in text
    assert "learning_rate: 0.001" in text and "finestsam 0" in text and "rank 0 of 1, epoch 0, step 0" in text


def test_a_mistake_of_the_user_is_no_crash(scenes, tmp_path, monkeypatch):
    assert start(scenes, tmp_path, "--max_steps=1") == 0
    FullDisk(monkeypatch, checkpoint, "save_last", first=1, last=99, limit=1000)
    assert resume(tmp_path, "--max_steps=2") == 2
    assert not (tmp_path / "run" / "crash.txt").exists()


def spoil_losses(monkeypatch, first: int, last: int = 10**9) -> None:
    """Make the loss of no number from the n-th image on."""
    original, calls = masks.object_losses, []

    def spoiled(*arguments):
        calls.append(1)
        losses = original(*arguments)
        return replace(losses, total=losses.total * math.nan) if first <= len(calls) <= last else losses

    monkeypatch.setattr(masks, "object_losses", spoiled)


def test_a_loss_that_is_no_number_is_skipped_reported_and_counted(scenes, tmp_path, monkeypatch, capsys):
    spoil_losses(monkeypatch, first=3, last=4)

    assert start(scenes, tmp_path, "--chunk_objects=500") == 0

    out, error = capsys.readouterr()
    assert error.count("skipped: loss or gradient is not finite: scene_") == 2
    assert "step 3 skipped" in error
    assert "2 steps were skipped" in out
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert (state["progress"]["step"], state["progress"]["skipped_steps"]) == (6, 0)
    assert all(row["total_loss"] != "nan" for row in read_rows(tmp_path / "run"))


def test_losses_that_stay_no_numbers_stop_the_run_with_3_and_the_checkpoint_from_before(
    scenes, tmp_path, monkeypatch, capsys
):
    spoil_losses(monkeypatch, first=6)

    assert start(scenes, tmp_path, "--chunk_objects=500", "--num_epochs=9") == 3

    out, error = capsys.readouterr()
    assert error.count("skipped: loss or gradient is not finite") == numbers.MAX_SKIPPED_STEPS
    assert "stopped: 10 steps in a row without a finite loss and gradient" in error
    assert "Traceback" not in error
    for name in ("last.ckpt", "best.pth"):
        assert_finite(torch.load(tmp_path / "run" / name, weights_only=True))
    monkeypatch.undo()
    assert resume(tmp_path, "--num_epochs=4") == 0


def assert_finite(node: object) -> None:
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            assert_finite(value)
    elif isinstance(node, torch.Tensor):
        assert node.isfinite().all()


def test_weights_that_a_step_breaks_are_neither_saved_nor_best(scenes, tmp_path, monkeypatch, capsys):
    calls = []
    count_step = train._count_step

    def break_weights(run, *arguments):
        count_step(run, *arguments)
        calls.append(1)
        if len(calls) == 8:  # the last step of the second epoch
            run.loaded.model.sam.mask_decoder.iou_token.weight.data.fill_(math.inf)

    monkeypatch.setattr(train, "_count_step", break_weights)

    assert start(scenes, tmp_path, "--num_epochs=5") == 3

    assert "stopped: weights that are not finite; last.ckpt and best.pth are from before" in capsys.readouterr().err
    last, best = (torch.load(tmp_path / "run" / name, weights_only=True) for name in ("last.ckpt", "best.pth"))
    assert last["progress"]["step"] == 4
    assert_finite(last["model"])
    assert_finite(best)


@pytest.mark.parametrize("epoch", [0, 1])
def test_figures_that_are_no_numbers_make_no_best_weights(scenes, tmp_path, monkeypatch, epoch):
    summarize, calls = masks.summarize_scores, []

    def spoiled(scores):
        calls.append(1)
        figures = summarize(scores)
        return dict.fromkeys(figures, math.nan) if len(calls) == 1 + epoch else figures

    monkeypatch.setattr(masks, "summarize_scores", spoiled)

    assert start(scenes, tmp_path, "--evaluate.generator=false", "--save_top_k=3") == 0

    card = json.loads((tmp_path / "run" / "best.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert card["step"] in ((0, 8) if epoch else (4, 8))
    rows = read_rows(tmp_path / "run")
    assert rows[epoch]["val_per_mask_iou"] == "" and rows[2]["val_per_mask_iou"] != ""
    assert not list((tmp_path / "run").glob("*inf*"))


@pytest.mark.parametrize("task", ["masks", "semantic"])
def test_images_that_break_in_the_middle_of_a_run_are_named_and_leave_no_figures(
    scenes, tmp_path, monkeypatch, capsys, task
):
    shutil.copytree(scenes, tmp_path / "scenes")
    count_step, broken = train._count_step, []

    def break_images(run, *arguments):
        count_step(run, *arguments)
        for record in run.data.val:
            record.path.write_bytes(b"")
            broken.append(record.file_name)

    monkeypatch.setattr(train, "_count_step", break_images)

    assert start(tmp_path / "scenes", tmp_path, f"--task={task}", "--evaluate.all_prompts=true") == 0

    error = capsys.readouterr().err
    assert broken and all(f"skipped: {name}: an empty file, not an image" in error for name in broken)
    rows = read_rows(tmp_path / "run")
    names = [name for name in rows[0] if name.startswith("val_")]
    assert any(rows[0][name] for name in names) and not any(row[name] for row in rows[1:] for name in names)


def test_a_step_that_does_not_fit_into_the_memory_saves_and_says_what_needs_less(
    scenes, whole, tmp_path, monkeypatch, capsys
):
    original, calls = masks.object_losses, []

    def too_large(*arguments):
        calls.append(1)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(masks, "object_losses", too_large)

    assert start(scenes, tmp_path, "--chunk_objects=500") == 2

    error = capsys.readouterr().err
    assert "warning: scene_" in error and "from here on 250 objects at a time" in error
    last = error.splitlines()[-1]
    assert "objects): the memory of cpu is too small even for one object at a time" in last
    assert "--losses.resolution low" in last and f"--resume {tmp_path / 'run'}" in last
    assert "Traceback" not in error and not (tmp_path / "run" / "crash.txt").exists()
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["progress"]["step"] == 5
    monkeypatch.undo()
    assert resume(tmp_path, "--chunk_objects=16") == 0


def test_a_validation_that_does_not_fit_into_the_memory_loses_no_epoch(scenes, whole, tmp_path, monkeypatch, capsys):
    find, calls = masks.find_candidates, []

    def too_large(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return find(*arguments)

    monkeypatch.setattr(masks, "find_candidates", too_large)

    assert start(scenes, tmp_path) == 2

    assert "generator: out of memory; try --generator.points_per" in capsys.readouterr().err
    monkeypatch.undo()
    assert resume(tmp_path) == 0
    assert_same_run(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def first_step(scenes, tmp_path_factory) -> Path:
    return run_training(scenes, tmp_path_factory.mktemp("sav"), "--run_name=run", *FLAGS, "--max_steps=1")


@pytest.fixture
def stopped(first_step, tmp_path) -> Path:
    """The folder of runs with one that was stopped after its first step."""
    shutil.copytree(first_step, tmp_path / "run")
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes rights from root")
def test_a_run_that_cannot_be_written_is_reported_before_it_is_continued(scenes, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "plots").mkdir(parents=True)
    (run / "config.yaml").write_text(f"dataset: {scenes}\ndevice: cpu\nmodel:\n  type: vit_tiny_test\n")
    printed = "cannot be written: Permission denied; what it learns could not be kept\n"

    for place in (run, run / "plots"):
        with read_only(place):
            assert resume(tmp_path) == 2
        assert capsys.readouterr().err == f"finestsam: --resume: {place} {printed}"
    (run / "plots").rmdir()
    (run / "plots").touch()
    assert resume(tmp_path) == 2
    assert f"{run / 'plots'} cannot be written: Not a directory" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes rights from root")
def test_a_run_that_cannot_be_written_any_more_says_what_helps(scenes, tmp_path, monkeypatch, capsys):
    save = checkpoint.save_last

    def save_without_rights(path, state):
        with read_only(path.parent):
            save(path, state)

    monkeypatch.setattr(checkpoint, "save_last", save_without_rights)

    assert start(scenes, tmp_path, "--max_steps=1") == 2

    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"finestsam: checkpoint not saved: Permission denied (at {tmp_path / 'run'}); allow this user"
    )
    assert "make room" not in error and "GB" not in error


def test_best_weights_that_are_gone_are_reported_at_the_end(scenes, tmp_path, monkeypatch, capsys):
    finish = train.finish_epoch

    def finish_and_lose(run, state, folder):
        finish(run, state, folder)
        folder.best.unlink(missing_ok=True)

    monkeypatch.setattr(train, "finish_epoch", finish_and_lose)

    assert start(scenes, tmp_path) == 2

    out, error = capsys.readouterr()
    printed = f"finestsam: {tmp_path / 'run' / 'best.pth'} is gone, and with it the best weights of the run; "
    assert error.splitlines()[-1].startswith(printed) and "the newest ones are in" in error
    assert f"weights: {tmp_path}" not in out


def test_two_processes_do_not_train_one_run(stopped, capsys):
    lock = lock_run(stopped / "run")
    before = (stopped / "run" / "last.ckpt").read_bytes()

    assert resume(stopped, "--max_steps=2") == 2

    assert f"{stopped / 'run'}: another process trains this run" in capsys.readouterr().err
    assert (stopped / "run" / "last.ckpt").read_bytes() == before
    lock.release()
    assert resume(stopped, "--max_steps=2") == 0


def test_the_lock_of_a_killed_process_is_taken_over(stopped):
    pid = os.fork()
    if pid == 0:
        lock_run(stopped / "run")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL

    assert resume(stopped, "--max_steps=2") == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.type=vit_tiny", "model.type is vit_tiny, the run has vit_tiny_test"),
        ("--model.image_size=128", "model.image_size is 128, the run has None"),
        ("--model_layer.freeze.image_encoder=true", "model_layer.freeze.image_encoder is True, the run has False"),
        ("--sched.type=ReduceLROnPlateau", "sched.type is ReduceLROnPlateau, the run has LambdaLR"),
        ("--opt.keep_original=auto", "opt.keep_original is auto, the run has 0.0"),
    ],
)
def test_a_setting_with_which_the_checkpoint_fits_no_more_is_refused_by_its_name(stopped, capsys, flag, message):
    assert resume(stopped, "--max_steps=2", flag) == 2
    assert message in capsys.readouterr().err


def test_a_changed_rate_or_batch_size_is_reported_with_the_one_that_wins(stopped, capsys):
    flags = ["--opt.learning_rate=1e-5", "--batch_size=2", "--losses.focal_gamma=1", "--num_workers=0"]

    assert resume(stopped, "--max_steps=2", *flags) == 0

    lines = [line for line in capsys.readouterr().err.splitlines() if "--resume" in line]
    assert lines == [
        "warning: --resume: batch_size: 2 from here on, 1 before",
        "warning: --resume: opt.learning_rate 1e-05: the run goes on with 0.001, which its optimizer holds",
        "warning: --resume: losses.focal_gamma: 1.0 from here on, 2.0 before",
        "warning: --resume: 2 images a step from here on, 1 before: not what an unbroken run learns",
    ]
    state = torch.load(stopped / "run" / "last.ckpt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["initial_lr"] == 1e-3
    # One image of four is done: of two images a step none is, and the first step begins with it again.
    assert state["progress"]["batches_done"] == 1


def test_a_damaged_checkpoint_of_a_run_gives_way_to_the_one_before(scenes, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    last = tmp_path / "run" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])

    assert resume(tmp_path) == 0

    assert "resuming from last.prev.ckpt" in capsys.readouterr().err
    assert_same_run(whole, tmp_path / "run")


def test_a_run_cut_by_max_steps_is_measured_once_and_goes_on_as_if_it_had_not_been(scenes, tmp_path, monkeypatch):
    flags = ["--sched.type=ReduceLROnPlateau", "--sched.ReduceLROnPlateau.epoch_patience=0", "--num_epochs=3"]
    flags += ["--early_stop_evaluations=9", "--sched.ReduceLROnPlateau.threshold=1"]
    # Each epoch is better than the one before, and than the half one.
    flags += ["--best_metric=val_generator_ar_100", "--prompts.use_boxes=false", "--dataset.background_points=0"]
    assert start(scenes, tmp_path / "unbroken", *flags) == 0
    measured = []
    commit = train.commit_validation

    def note(run, state, folder, validation, *others, **named):
        if validation:
            measured.append(state.progress.step)
        commit(run, state, folder, validation, *others, **named)

    monkeypatch.setattr(train, "commit_validation", note)
    assert start(scenes, tmp_path, *flags, "--max_steps=6") == 0
    assert measured == [0, 4, 6]
    monkeypatch.undo()

    assert resume(tmp_path, "--max_steps=0") == 0

    first, second = (
        torch.load(folder / "run" / "last.ckpt", weights_only=True) for folder in (tmp_path / "unbroken", tmp_path)
    )
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert first["scheduler"] == second["scheduler"]
    names = ("epoch", "step", "evaluations_without_better")
    assert [first["progress"][name] for name in names] == [second["progress"][name] for name in names]


def test_a_checkpoint_with_another_division_of_the_weights_is_refused_in_one_line(stopped, capsys):
    path = stopped / "run" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(state, path)

    assert resume(stopped, "--max_steps=2") == 2

    assert "begun by a version of finestsam that divides the weights otherwise" in capsys.readouterr().err


@pytest.mark.parametrize("devices", ["0", "[0, 2]"])
def test_devices_that_cannot_be_are_refused_in_a_line(capsys, devices):
    assert main(["--mode=train", "--dataset=d", "--device=cpu", f"--num_devices={devices}"]) == 2
    assert f"--num_devices {devices} of device cpu: " in capsys.readouterr().err
