"""What is refused of a run that is continued: other data, and a state that is none."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_training

from finestsam.cli import main
from finestsam.config import build_config, flatten_config
from finestsam.data.fingerprint import SPLIT, hash_fingerprint, take_fingerprint
from finestsam.data.read import LabelledSet
from finestsam.errors import UserError
from finestsam.records import DatasetReport
from finestsam.training.resume import STATE, check_settings, find_problem, load_state, refuse_other_dataset
from finestsam.training.state import Progress

REFUSED = "the dataset is not the one that the run was trained on"


@pytest.fixture
def data(records) -> LabelledSet:
    return LabelledSet(list(records[:4]), list(records[4:]), ["a"], DatasetReport(), "COCO", {1: "a"})


def test_its_own_data_are_taken_without_the_file_that_describes_them(data, tmp_path):
    refuse_other_dataset(tmp_path, {"dataset": hash_fingerprint(take_fingerprint(data))}, take_fingerprint(data))


def test_changed_data_are_refused_with_the_difference(data, tmp_path):
    before = take_fingerprint(data)
    (tmp_path / SPLIT).write_text(json.dumps(before, indent=1))
    data.train.reverse()

    with pytest.raises(UserError, match=rf"{REFUSED} \(the order of the images\); start a new run"):
        refuse_other_dataset(tmp_path, {"dataset": hash_fingerprint(before)}, take_fingerprint(data))

    name = data.val.pop().file_name
    with pytest.raises(UserError, match=rf"{REFUSED} \(gone: {name}\); start a new run"):
        refuse_other_dataset(tmp_path, {"dataset": hash_fingerprint(before)}, take_fingerprint(data))


@pytest.mark.parametrize("content", [None, "", "[1]", '{"train": []}', "another run's"])
def test_without_the_run_s_own_description_the_difference_is_not_guessed(data, tmp_path, content):
    if content is not None:
        own = json.dumps(take_fingerprint(data))
        (tmp_path / SPLIT).write_text(own if content == "another run's" else content)

    with pytest.raises(UserError, match=rf"{REFUSED}; start a new run"):
        refuse_other_dataset(tmp_path, {"dataset": "of something else"}, take_fingerprint(data))


@pytest.mark.parametrize(("name", "is_reported"), [("max_objects", True), ("background_points", True), ("sav", False)])
def test_a_change_of_what_a_step_needs_is_reported(capsys, name, is_reported):
    config = build_config({"model.type": "vit_tiny_test"})
    state = {"config": json.dumps(flatten_config(config) | {f"dataset.{name}": 7})}

    check_settings(config, state, 1)

    assert (f"dataset.{name}" in capsys.readouterr().err) is is_reported


@pytest.mark.parametrize(("steps", "is_reported"), [((0.6, 0.85), True), ((100, 200), False), ((), False)])
def test_more_epochs_move_what_is_a_share_of_them(capsys, steps, is_reported):
    config = build_config({"model.type": "vit_tiny_test", "sched.LambdaLR.steps": list(steps), "num_epochs": 20})
    state = {"config": json.dumps(flatten_config(config) | {"num_epochs": 10})}

    check_settings(config, state, 1)

    assert ("of another length" in capsys.readouterr().err) is is_reported


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> Path:
    """The folder of a run of two epochs with a checkpoint after each."""
    return run_training(
        scenes, tmp_path_factory.mktemp("runs"), "--dataset.val_size=0.4", "--generator.points_per_side=4"
    )


# Each a place in a checkpoint and what stands there.
MISFITS = [
    *[((name,), value) for name in STATE for value in (None, 7.5, [])],
    (("model_type",), "vit_x"), (("image_size",), 10**9), (("image_size",), 100), (("image_size",), -64),
    (("model",), {}), (("model", "mask_decoder.iou_token.weight"), torch.zeros(3)),
    (("model", "image_encoder.pos_embed"), torch.zeros(1).expand(10**5, 10**5)), (("model", 5), torch.zeros(3)),
    (("model", "image_encoder.pos_embed"), torch.ones(1, 4, 4, 32).to_sparse()),
    (("optimizer", "state"), {0: 5}), (("optimizer", "param_groups"), {}),
    (("optimizer", "param_groups", 0, "lr"), "x"),
    (("optimizer", "param_groups", 0, "lr"), float("nan")), (("optimizer", "param_groups", 0, "params"), ["a"]),
    (("scheduler", "last_epoch"), "1"), (("scheduler",), {}), (("progress", "step"), "1"), (("progress", "step"), -1),
    (("progress", "epoch"), 1.5), (("progress", "unknown"), 1), (("progress", "metrics"), None),
    (("progress", "best"), 3), (("progress", "sums"), {"a": "b"}),
    (("progress", "generator"), {"points_per_side": 10**9}),
    (("random", "torch"), torch.zeros(3)), (("random", "python"), (3, (1, 2), None)), (("random", "numpy"), {}),
    (("config",), "{"), (("config",), "[]"), (("config",), "{}"), (("config",), "[" * 99_999), (("categories",), 7),
    (("class_head",), []), (("images_per_batch",), 0), (("images_per_batch",), "2"),
]  # fmt: skip


def change(state: dict, place: tuple, value: object) -> dict:
    state = copy.deepcopy(state)
    part = state
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return state


def test_the_state_of_a_run_has_no_problem(run):
    state = torch.load(run / "last.ckpt", weights_only=True)

    assert find_problem(state, Progress) is None
    assert find_problem({name: value for name, value in state.items() if name in STATE}, Progress) is None  # of old


@pytest.mark.parametrize(("place", "value"), MISFITS, ids=lambda part: str(part)[:30])
def test_a_state_of_another_kind_gives_way_to_the_one_before_it(run, tmp_path, capsys, place, value):
    state = torch.load(run / "last.ckpt", weights_only=True)
    torch.save(state, tmp_path / "last.prev.ckpt")
    torch.save(change(state, place, value), tmp_path / "last.ckpt")

    assert load_state(tmp_path, Progress)["progress"] == state["progress"]
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "resuming from last.prev.ckpt" in warning
    assert len(warning.splitlines()) == 1 and len(warning) < 900
    (tmp_path / "last.prev.ckpt").unlink()
    with pytest.raises(UserError, match="no checkpoint is left to resume from"):
        load_state(tmp_path, Progress)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("optimizer", "param_groups"), []),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
        (("model", "image_encoder.blocks.1.attn.lora"), torch.zeros(1)),
    ],
)
def test_a_state_for_other_weights_is_one_line(run, tmp_path, capsys, place, value):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "last.prev.ckpt").unlink()
    state = torch.load(run / "last.ckpt", weights_only=True)
    torch.save(change(state, place, value), copied / "last.ckpt")

    assert main(["--mode=train", f"--resume={copied}", "--num_epochs=3"]) == 2
    assert "divides the weights otherwise" in capsys.readouterr().err


def rename(entries: dict, new: str, old: str) -> dict:
    return {old if name == new else name: value for name, value in entries.items()}


def test_a_run_whose_files_have_the_first_names_goes_on_exactly(scenes, tmp_path):
    flags = ["--dataset.val_size=0.4", "--num_epochs=2", "--generator.points_per_side=4"]
    whole = run_training(scenes, tmp_path / "whole", *flags)
    broken = run_training(scenes, tmp_path / "broken", "--max_steps=2", *flags)
    split = json.loads((broken / SPLIT).read_text())
    split |= {side: [rename(entry, "image", "picture") for entry in split[side]] for side in ("train", "val")}
    (broken / SPLIT).write_text(json.dumps(split))
    state = rename(torch.load(broken / "last.ckpt", weights_only=True), "images_per_batch", "pictures_per_batch")
    progress = rename(state["progress"], "baseline", "floor")
    torch.save(state | {"progress": progress, "dataset": hash_fingerprint(split)}, broken / "last.ckpt")
    (broken / "last.prev.ckpt").unlink()

    assert main(["--mode=train", f"--resume={broken}", "--max_steps=0"]) == 0

    first, second = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (whole, broken))
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert first["progress"]["baseline"] == second["progress"]["baseline"]


def test_a_checkpoint_with_affinities_is_refused_in_one_line(run):
    state = torch.load(run / "last.ckpt", weights_only=True) | {"affinity_head": {"weight": torch.zeros(1)}}

    assert find_problem(state, Progress).startswith("it was trained on affinities, which only the recipe")


def test_top_weights_of_an_old_kind_are_ranked_by_their_names(run, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    state = torch.load(run / "last.ckpt", weights_only=True)
    torch.save(state | {"top_weights": {"3-0.50.pth": 0.5}}, copied / "last.ckpt")

    assert main(["--mode=train", f"--resume={copied}", "--num_epochs=2"]) == 0
    assert "already complete" in capsys.readouterr().out
