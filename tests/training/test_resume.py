"""What is refused where the data of a run that is continued are not its own."""

import json

import pytest

from finestsam.config import build_config, flatten_config
from finestsam.data.fingerprint import SPLIT, hash_fingerprint, take_fingerprint
from finestsam.data.read import LabelledSet
from finestsam.data.report import DatasetReport
from finestsam.errors import UserError
from finestsam.training.resume import check_settings, refuse_other_dataset

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

    with pytest.raises(UserError, match=rf"{REFUSED} \(the order of the pictures\); start a new run"):
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


@pytest.mark.parametrize(("name", "is_told"), [("max_objects", True), ("background_points", True), ("sav", False)])
def test_a_change_of_what_a_step_asks_is_told(capsys, name, is_told):
    config = build_config({"model.type": "vit_tiny_test"})
    state = {"config": json.dumps(flatten_config(config) | {f"dataset.{name}": 7})}

    check_settings(config, state, 1)

    assert (f"dataset.{name}" in capsys.readouterr().err) is is_told


@pytest.mark.parametrize(("steps", "is_told"), [((0.6, 0.85), True), ((100, 200), False), ((), False)])
def test_more_epochs_move_what_is_a_share_of_them(capsys, steps, is_told):
    config = build_config({"model.type": "vit_tiny_test", "sched.LambdaLR.steps": list(steps), "num_epochs": 20})
    state = {"config": json.dumps(flatten_config(config) | {"num_epochs": 10})}

    check_settings(config, state, 1)

    assert ("of another length" in capsys.readouterr().err) is is_told
