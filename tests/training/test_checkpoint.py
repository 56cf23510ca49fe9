import os
import random
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_limited_to, list_names

from finestsam.errors import UserError
from finestsam.model.saving import CheckpointNotSaved
from finestsam.runtime.whole_files import remove_unfinished
from finestsam.training import run_folder
from finestsam.training.checkpoint import TopWeights, load_state, save_last
from finestsam.training.random_state import random_state, restore_random_state
from finestsam.training.run_folder import create_run_folder

WEIGHTS = {"image_encoder.pos_embed": torch.ones(1)}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "last.ckpt"
    save_last(path, {"step": 1})
    before = path.read_bytes()

    with (
        files_limited_to(100_000),
        pytest.raises(CheckpointNotSaved, match=r"^checkpoint not saved: File too large \("),
    ):
        save_last(path, {"step": 2, "weights": torch.zeros(100_000)})

    assert path.read_bytes() == before
    assert list_names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_saving_leaves_a_checkpoint_and_the_next_start_tidies_up(tmp_path, moment):
    save_last(tmp_path / "last.ckpt", {"step": 1})
    save_last(tmp_path / "last.ckpt", {"step": 2})
    script = f"""
        import os, signal
        from pathlib import Path
        import torch
        from finestsam.training.checkpoint import save_last
        os.{moment} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        save_last(Path({str(tmp_path)!r}) / "last.ckpt", {{"step": 3, "weights": torch.zeros(1000)}})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.tmp"))) == 1

    remove_unfinished(tmp_path)

    assert load_state(tmp_path) == {"step": 2}
    assert list_names(tmp_path) == ["last.ckpt", "last.prev.ckpt"]


def test_a_kill_between_the_two_renames_leaves_the_previous_checkpoint(tmp_path, capsys):
    save_last(tmp_path / "last.ckpt", {"step": 1})
    os.replace(tmp_path / "last.ckpt", tmp_path / "last.prev.ckpt")
    assert load_state(tmp_path) == {"step": 1}
    assert "last.ckpt is missing; resuming from last.prev.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lambda path: path.write_bytes(b""), Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, capsys, damage):
    for step in (1, 2, 3):
        save_last(tmp_path / "last.ckpt", {"step": step, "weights": torch.zeros(1000)})
    assert load_state(tmp_path)["step"] == 3
    assert capsys.readouterr().err == ""

    damage(tmp_path / "last.ckpt")

    assert load_state(tmp_path)["step"] == 2
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {tmp_path / 'last.ckpt'} is ")
    assert error.count("\n") == 1


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    for step in (1, 2):
        save_last(tmp_path / "last.ckpt", {"step": step})
    truncate(tmp_path / "last.ckpt")
    (tmp_path / "last.prev.ckpt").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"last.ckpt is damaged; .*last.prev.ckpt is damaged; no checkpoint is left"):
        load_state(tmp_path)


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no last.ckpt to resume from"):
        load_state(tmp_path)


class Command:
    def __init__(self, line: str):
        self.line = line

    def __reduce__(self):
        return os.system, (self.line,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save({"model": Command(f"touch {tmp_path / 'ran'}")}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="last.ckpt contains code, refused") as caught:
        load_state(tmp_path)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_holds_something_else_is_an_error(tmp_path):
    torch.save([1, 2], tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="last.ckpt holds a list, not the state of a run"):
        load_state(tmp_path)


def test_random_numbers_continue_where_they_were_saved(tmp_path):
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn()]

    draw()  # leaves half a pair of normal numbers behind
    save_last(tmp_path / "last.ckpt", {"random": random_state()})
    expected = draw()
    draw()
    restore_random_state(load_state(tmp_path)["random"])
    assert draw() == expected


def test_the_best_weights_stay_and_best_and_last_are_left_alone(tmp_path):
    for name in ("best.pth", "last.ckpt", "last.prev.ckpt"):
        (tmp_path / name).touch()
    top = TopWeights(tmp_path, 2)
    written = []
    for step, metric in [(10, 0.5), (20, 0.7), (30, 0.4), (40, 0.6), (50, float("nan")), (60, 0.704)]:
        path = top.save(WEIGHTS, step, {"iou": metric}, "iou")
        if path:
            path.with_suffix(".json").touch()
            written.append(path.name)

    assert written == ["10-0.50.pth", "20-0.70.pth", "40-0.60.pth", "60-0.70.pth"]
    assert list_names(tmp_path) == [
        "20-0.70.json",
        "20-0.70.pth",
        "60-0.70.json",
        "60-0.70.pth",
        "best.pth",
        "last.ckpt",
        "last.prev.ckpt",
    ]


def test_no_best_weights_are_kept_when_none_are_requested(tmp_path):
    assert TopWeights(tmp_path, 0).save(WEIGHTS, 1, {"iou": 0.9}, "iou") is None
    assert list_names(tmp_path) == []


def test_weights_that_were_not_measured_are_not_among_the_best(tmp_path):
    assert TopWeights(tmp_path, 1).save(WEIGHTS, 1, {"recall": 0.9}, "iou") is None
    assert list_names(tmp_path) == []


def test_of_equal_weights_the_earlier_stay(tmp_path):
    top = TopWeights(tmp_path, 1)
    assert top.save(WEIGHTS, 9, {"iou": 0.5}, "iou")
    assert top.save(WEIGHTS, 10, {"iou": 0.5}, "iou") is None
    assert list_names(tmp_path) == ["9-0.50.pth"]


def test_the_best_weights_of_a_resumed_run_are_those_of_an_unbroken_one(tmp_path):
    metrics = {1: 0.501, 2: 0.504, 3: 0.503, 4: 0.502, 5: 0.3}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    top = TopWeights(unbroken, 2)
    for step, metric in metrics.items():
        top.save(WEIGHTS, step, {"iou": metric}, "iou")

    first, resumed = TopWeights(broken, 2), TopWeights(broken, 2)
    first.save(WEIGHTS, 1, {"iou": metrics[1]}, "iou")
    first.save(WEIGHTS, 2, {"iou": metrics[2]}, "iou")
    state = first.state_dict()
    first.save(WEIGHTS, 3, {"iou": metrics[3]}, "iou")  # after the last checkpoint: the resumed run comes here again
    resumed.load_state_dict(state)
    for step in (3, 4, 5):
        resumed.save(WEIGHTS, step, {"iou": metrics[step]}, "iou")

    assert list_names(broken) == list_names(unbroken) == ["2-0.50.pth", "3-0.50.pth"]
    assert resumed.state_dict() == top.state_dict()


def test_a_run_continued_with_another_metric_ranks_and_names_its_weights_by_that(tmp_path):
    first, resumed = TopWeights(tmp_path, 2), TopWeights(tmp_path, 2)
    first.save(WEIGHTS, 1, {"iou": 0.9, "recall": 0.1}, "iou").with_suffix(".json").touch()
    first.save(WEIGHTS, 2, {"iou": 0.8, "recall": 0.3}, "iou").with_suffix(".json").touch()
    resumed.load_state_dict(first.state_dict())

    assert resumed.save(WEIGHTS, 3, {"iou": 0.1, "recall": 0.05}, "recall") is None
    assert list_names(tmp_path) == ["1-0.10.json", "1-0.10.pth", "2-0.30.json", "2-0.30.pth"]
    assert resumed.save(WEIGHTS, 4, {"iou": 0.1, "recall": 0.2}, "recall")
    assert list_names(tmp_path) == ["2-0.30.json", "2-0.30.pth", "4-0.20.pth"]


def test_weights_written_after_the_checkpoint_are_ranked_by_their_name(tmp_path):
    first, resumed = TopWeights(tmp_path, 2), TopWeights(tmp_path, 2)
    first.save(WEIGHTS, 1, {"iou": 0.5}, "iou")
    state = first.state_dict()
    first.save(WEIGHTS, 2, {"iou": 0.9}, "iou")  # and never again: the resumed run validates elsewhere
    resumed.load_state_dict(state)
    resumed.save(WEIGHTS, 3, {"iou": 0.6}, "iou")

    assert list_names(tmp_path) == ["2-0.90.pth", "3-0.60.pth"]


def test_the_worst_weights_go_only_when_the_new_ones_are_written(tmp_path):
    top = TopWeights(tmp_path, 1)
    top.save(WEIGHTS, 1, {"iou": 0.1}, "iou")
    with files_limited_to(100), pytest.raises(CheckpointNotSaved):
        top.save(WEIGHTS, 2, {"iou": 0.2}, "iou")
    assert list_names(tmp_path) == ["1-0.10.pth"]


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "2026-11-21_01-30-00")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_run_folder(tmp_path / "sav", None), range(8)))
    assert len(set(folders)) == 8
    names = ["2026-11-21_01-30-00", *(f"2026-11-21_01-30-00-{number}" for number in range(2, 9))]
    assert list_names(tmp_path / "sav") == names


def test_a_run_has_the_name_that_it_is_given(tmp_path):
    folder = create_run_folder(tmp_path / "sav", "nuclei first")
    assert folder == tmp_path / "sav" / "nuclei first"
    assert create_run_folder(tmp_path / "sav", "nuclei first") == folder  # nothing is in it yet


def test_the_name_of_another_run_is_refused(tmp_path):
    folder = create_run_folder(tmp_path, "a")
    (folder / "last.ckpt").touch()
    with pytest.raises(UserError, match=rf"{folder} holds files; .* continue that run with --resume {folder}"):
        create_run_folder(tmp_path, "a")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; choose another --run_name"):
        create_run_folder(tmp_path, "file")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\nb", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="is not the plain name of a folder"):
        create_run_folder(tmp_path / "sav", name)
    assert list_names(tmp_path / "sav") == []


def test_a_place_where_no_run_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is the root of the disk, expected a folder below it"):
        create_run_folder(Path("/"), None)
    with pytest.raises(UserError, match="sav_dir .*file is a file, expected a folder"):
        create_run_folder(tmp_path / "file", None)
    with pytest.raises(UserError, match="sav_dir .*cannot be made: Not a directory"):
        create_run_folder(tmp_path / "file" / "sav", None)
    with pytest.raises(UserError, match="cannot make the run's folder in it: File name too long"):
        create_run_folder(tmp_path, "a" * 300)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot make the run's folder in it: Permission denied"):
        create_run_folder(tmp_path, None)
