"""What the processes that read images ahead hand over, and what they say when they cannot."""

import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from finestsam.config import build_config
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.loaders import Loader, _print_unless_parent_stopped, build_validation_loader, end_workers
from finestsam.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dataset(records) -> SampleDataset:
    config = build_config({"prompts.mix": False})
    return SampleDataset(records, SampleSettings(64, 16, 0, config.prompts, config.dataset))


def test_processes_hand_over_what_this_one_would_have_read(dataset):
    alone, helped = (list(build_validation_loader(dataset, num_workers)) for num_workers in (0, 2))

    for (one, _), (other, _) in zip(alone, helped, strict=True):
        assert torch.equal(one.samples[0].image, other.samples[0].image)
        assert torch.equal(one.samples[0].prompts.boxes, other.samples[0].prompts.boxes)
        assert one.samples[0].rles == other.samples[0].rles


@pytest.mark.filterwarnings("error:.*worker:UserWarning")
def test_more_processes_than_cores_are_no_warning(dataset, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert len(list(build_validation_loader(dataset, 2))) == len(dataset)


def test_a_full_shared_memory_is_an_error_in_one_line(dataset, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)

    assert len(list(build_validation_loader(dataset, 0))) == len(dataset)
    with pytest.raises(UserError, match="docker's --shm-size, or use no such processes with --num_workers 0$"):
        list(build_validation_loader(dataset, 2))


def test_another_error_of_a_process_keeps_its_traceback():
    def fail(samples):
        raise ZeroDivisionError

    before = multiprocessing.active_children()

    with pytest.raises(ZeroDivisionError, match="Original Traceback"):
        list(Loader([1, 2], fail, num_workers=1))

    assert [process for process in multiprocessing.active_children() if process not in before] == []


def test_a_pass_that_is_left_ends_its_processes_at_once():
    before = multiprocessing.active_children()

    def leave():
        items = iter(Loader(range(8), list, num_workers=2))
        next(items)
        circle = [items]  # as an error makes with the frames it came through
        circle.append(circle)
        return [process for process in multiprocessing.active_children() if process not in before]

    processes = leave()
    gc.collect()

    # Of themselves: they are killed only after they were waited for.
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("is_ended", [True, False])
def test_the_processes_of_a_training_loader_outlive_its_passes_and_not_itself(is_ended):
    loader = Loader(range(8), list, num_workers=2, persistent_workers=True)
    before = multiprocessing.active_children()

    for _ in range(2):
        list(loader)
        next(iter(loader))
    started = {process.pid for process in multiprocessing.active_children()} - {process.pid for process in before}
    assert len(started) == 2
    if is_ended:
        end_workers(loader)
    del loader
    gc.collect()

    assert [process for process in multiprocessing.active_children() if process not in before] == []


def test_what_is_kept_of_a_loader_keeps_no_process_from_ending():
    script = """
        from finestsam.data.loaders import Loader
        def fail(samples):
            raise ZeroDivisionError
        try:
            list(Loader([1, 2], fail, num_workers=1))
        except ZeroDivisionError as error:
            kept = error
        begun = iter(Loader([1, 2], list, num_workers=1))
        print(next(begun))
    """

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert (result.returncode, result.stdout, result.stderr) == (0, "[1]\n", "")


def test_tensors_that_nobody_takes_any_more_are_no_error_of_a_process(capsys):
    for kind in (ConnectionResetError, BrokenPipeError, EOFError, ZeroDivisionError):
        try:
            raise kind("said")
        except kind as error:
            _print_unless_parent_stopped(kind, error, error.__traceback__)

    error = capsys.readouterr().err
    assert error.count("Traceback") == 1 and error.endswith("ZeroDivisionError: said\n")


def may_mount() -> bool:
    command = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm"]
    try:
        return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="nobody but root gets a shared memory of its own")
def test_a_shared_memory_that_is_full_is_waited_for_by_nobody():
    script = """
        import torch
        from finestsam.data.loaders import Loader
        from finestsam.errors import UserError
        try:
            list(Loader([torch.zeros(1_000_000)] * 4, list, num_workers=2))
        except UserError as error:
            print(error)
    """
    command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    command += [sys.executable, "-c", textwrap.dedent(script)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert done.stdout.startswith("the shared memory (/dev/shm) is too small"), done.stderr
