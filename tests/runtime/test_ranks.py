"""Runs of two processes, one of which is stopped, fails or has less to do."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import FROM_SCRATCH, SMALL_STEPS, run_training, wait_for_epoch
from test_signals import wait_for_end

from finestsam.cli import main

ROOT = Path(__file__).parents[2]
FLAGS = ["--num_epochs=3", "--dataset.val_size=0.5", "--generator.points_per_side=4"]

# The command with a fault in one of its processes. Fabric starts the second by running the same file again.
SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    from dataclasses import replace
    import torch
    from finestsam.cli import main
    from finestsam.tasks import masks
    from finestsam.training import setup, train
    setup.measure_need = lambda *arguments: None  # its losses would count as calls

    def at_call(module, name, call, rank, fault):
        function, calls = getattr(module, name), []
        def called(*arguments, **named):
            calls.append(1)
            if len(calls) == call and os.environ.get("LOCAL_RANK", "0") == str(rank):
                fault()
            return function(*arguments, **named)
        setattr(module, name, called)

    def send(number):
        return lambda: os.kill(os.getpid(), number)

    def spoil(call, rank):
        function, calls = masks.object_losses, []
        def called(*arguments):
            calls.append(1)
            losses = function(*arguments)
            is_now = len(calls) == call and os.environ.get("LOCAL_RANK", "0") == str(rank)
            return replace(losses, total=losses.total * float("nan")) if is_now else losses
        masks.object_losses = called

    def fail(error):
        def fault():
            raise error
        return fault

    if __name__ == "__main__":
        {fault}
        sys.exit(main())
"""


def start_two(scenes: Path, folder: Path, fault: str, *flags: str) -> subprocess.Popen:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(root=str(ROOT), fault=fault))
    arguments = ["--mode=train", f"--dataset={scenes}", "--model.type=vit_tiny_test", f"--sav_dir={folder / 'sav'}"]
    arguments += ["--device=cpu", "--num_devices=2", "--num_workers=0", "--run_name=run", *FROM_SCRATCH, *FLAGS, *flags]
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for the end, see that nothing is left, and return exit code, stdout and stderr."""
    out, error = process.communicate(timeout=400)
    assert wait_for_end(process.pid) == []
    return process.returncode, out, error


def resume_two(folder: Path) -> int:
    command = [sys.executable, "-m", "finestsam", "--mode=train", f"--resume={folder / 'sav' / 'run'}"]
    return subprocess.run(command, cwd=ROOT, timeout=400).returncode


def load_last(run: Path) -> dict:
    return torch.load(run / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, error = end(start_two(scenes, folder, "pass"))
    assert code == 0, error
    return folder


@pytest.mark.parametrize(
    "fault",
    [
        "at_call(train, '_count_step', 2, 1, send(signal.SIGTERM))",
        pytest.param("at_call(masks, 'score_batches', 1, 0, send(signal.SIGTERM))", marks=pytest.mark.slow),
        pytest.param("at_call(train, '_count_step', 2, 0, send(signal.SIGTERM))", marks=pytest.mark.slow),
        pytest.param("at_call(masks, 'score_batches', 2, 1, send(signal.SIGTERM))", marks=pytest.mark.slow),
        pytest.param("at_call(masks, 'find_candidates', 1, 1, send(signal.SIGTERM))", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_exactly(scenes, whole, tmp_path, fault):
    code, out, error = end(start_two(scenes, tmp_path, fault))

    assert code == 143, error
    assert out.count("to go on: --mode train --resume") == 1
    assert "Traceback" not in error
    assert resume_two(tmp_path) == 0
    first, second = (load_last(folder / "sav" / "run") for folder in (tmp_path, whole))
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_on_one_process_ends_both_with_its_message(scenes, tmp_path, rank):
    fault = f"at_call(train, '_count_step', 4, {rank}, fail(ZeroDivisionError('rank {rank} fails')))"

    code, _, error = end(start_two(scenes, tmp_path, fault))

    assert code != 0
    assert f"rank {rank} fails" in error
    run = tmp_path / "sav" / "run"
    assert f"rank {rank} of 2" in (run / "crash.txt").read_text()
    assert load_last(run)["progress"]["step"] < 4  # nobody saved after it


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_of_one_process_that_is_no_number_is_skipped_by_both(scenes, tmp_path, rank):
    code, out, error = end(start_two(scenes, tmp_path, f"spoil(2, {rank})", "--chunk_objects=500"))

    assert code == 0, error
    # Of three images the second process has one in every other step.
    line = next(line for line in error.splitlines() if "skipped: loss" in line)
    assert re.fullmatch(rf"step {2 + rank} skipped: loss or gradient is not finite: scene_\d+\.png", line)
    assert "1 steps were skipped" in out
    state = load_last(tmp_path / "sav" / "run")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert state["progress"]["step"] == 2 * 3 - 1


@pytest.mark.slow
def test_losses_of_one_process_that_stay_no_numbers_stop_both_with_3(scenes, tmp_path):
    fault = "\n    ".join(f"spoil({call}, 0)" for call in range(4, 40))

    code, _, error = end(start_two(scenes, tmp_path, fault, "--chunk_objects=500", "--num_epochs=20"))

    assert code == 3
    assert error.count("stopped: 10 steps in a row") == 1
    assert load_last(tmp_path / "sav" / "run")["progress"]["step"] <= 3


FULL = "fail(torch.OutOfMemoryError('CUDA out of memory'))"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_of_which_one_runs_out_of_memory_take_the_step_again_together(scenes, tmp_path, rank):
    fault = f"at_call(masks, 'object_losses', 2, {rank}, {FULL})"
    code, _, error = end(start_two(scenes, tmp_path, fault, "--num_epochs=1", "--chunk_objects=2"))
    assert code == 0, error
    assert error.count("from here on 1 objects at a time") == 1

    one = run_training(scenes, tmp_path, "--run_name=one", "--batch_size=2", *FLAGS, "--num_epochs=1")
    first, second = load_last(one), load_last(tmp_path / "sav" / "run")
    assert second["progress"]["chunk_objects"] == 1
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_of_which_one_has_too_little_memory_end_with_one_message(scenes, tmp_path, rank):
    fault = f"at_call(masks, 'object_losses', 2, {rank}, {FULL})"

    code, _, error = end(start_two(scenes, tmp_path, fault, "--chunk_objects=1"))

    assert code == 2
    assert error.count("even for one object at a time; less is needed with") == 1
    assert "Traceback" not in error
    assert load_last(tmp_path / "sav" / "run")["progress"]["step"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_one_process_finds_ends_both_with_one_line(scenes, tmp_path, rank):
    fault = f"at_call(setup, 'read_training_set', 1, {rank}, fail(setup.UserError('nothing to train on')))"

    code, _, error = end(start_two(scenes, tmp_path, fault))

    assert code == 2
    assert error.count("finestsam: nothing to train on") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "sav").exists()


@pytest.mark.slow
def test_the_second_process_ends_when_the_first_is_killed(scenes, tmp_path):
    process = start_two(scenes, tmp_path, "pass", "--num_epochs=10000")
    wait_for_epoch(process)
    os.kill(process.pid, signal.SIGKILL)

    process.wait(timeout=300)
    assert wait_for_end(process.pid, seconds=60) == []


@pytest.mark.slow
def test_processes_without_a_validation_image_and_with_empty_last_batches_wait_for_nobody(scenes, tmp_path):
    # One image to validate on, and five to train on in steps of four: rank 1 has none, then no batch that is full.
    flags = ["--dataset.val_size=0.1", "--batch_size=2", "--num_epochs=2", "--prompts.mix=true"]
    flags += ["--prompts.use_boxes=true", "--prompts.use_masks=true", "--opt.accumulate_batches=2"]

    code, out, error = end(start_two(scenes, tmp_path, "pass", *flags))

    assert code == 0, error
    assert "validating on 1" in out
    assert [path.name for path in (tmp_path / "sav").iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--model_layer.freeze.prompt_encoder=true"],
        ["--model_layer.freeze.mask_decoder=true", "--prompts.use_boxes=true", "--prompts.use_points=false"],
        ["--model_layer.freeze.mask_decoder=true", "--prompts.use_points=false", "--prompts.use_masks=true"],
        ["--prompts.use_logits=true", "--prompts.use_boxes=true"],
        ["--prompts.mix=true", "--prompts.use_boxes=true", "--prompts.use_masks=true", "--opt.accumulate_batches=2"],
        ["--task=classes", "--dataset.background_points=3", "--opt.accumulate_batches=2"],
        ["--task=classes", "--model_layer.freeze.mask_decoder=true", "--model_layer.freeze.image_encoder=true"],
        ["--task=semantic"],
        ["--task=semantic", "--model_layer.freeze.image_encoder=true", "--opt.accumulate_batches=2"],
    ],
)
def test_every_freeze_and_prompt_mix_learns_on_two_processes_what_one_learns(scenes, tmp_path, flags):
    flags = [*flags, "--num_epochs=1", *SMALL_STEPS]
    code, _, error = end(start_two(scenes, tmp_path, "pass", *flags))
    assert code == 0, error
    one = run_training(scenes, tmp_path, "--run_name=one", "--batch_size=2", *FLAGS, *flags)

    first, second = load_last(one), load_last(tmp_path / "sav" / "run")
    for part in ("model", "class_head", "semantic_head"):
        for name, value in (first.get(part) or {}).items():
            torch.testing.assert_close(second[part][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [2, 6, 5], ids=["in the first epoch", "in a later epoch", "between two epochs"])
def test_a_resumed_run_matches_an_unbroken_one_with_any_number_of_workers(scenes, tmp_path, workers, steps):
    flags = ["--num_epochs=2", "--dataset.val_size=0.2", f"--num_workers={workers}"]
    run_training(scenes, tmp_path, "--run_name=whole", *flags)
    run_training(scenes, tmp_path, "--run_name=broken", f"--max_steps={steps}", *flags)

    assert main(["--mode=train", f"--resume={tmp_path / 'broken'}", "--max_steps=0"]) == 0

    first, second = (load_last(tmp_path / name)["model"] for name in ("whole", "broken"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)
