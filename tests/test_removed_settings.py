from pathlib import Path

import pytest
import yaml

from benchmarks.broken_files import nest_settings
from finestsam.cli import main, parse_command_line
from finestsam.config import Config, flatten_config, list_settings
from finestsam.errors import UserError
from finestsam.removed_settings import REMOVED, RENAMED, drop_removed

CONSTANTS = {name: removed.value for name, removed in REMOVED.items()}
OTHER = {bool: lambda value: not value, float: lambda value: value + 1, int: lambda value: value + 1}


def write_run(folder: Path, **changed: object) -> Path:
    """Write the settings of a run from when it had all of those that are gone."""
    folder.mkdir(parents=True)
    settings = flatten_config(Config()) | CONSTANTS | {"dataset.path": "d", "num_epochs": 7} | changed
    del settings["resume"], settings["preset"]
    (folder / "config.yaml").write_text(yaml.safe_dump(nest_settings(settings), sort_keys=False))
    (folder / "split.json").write_text("{}")
    return folder


def change(name: str) -> object:
    value = REMOVED[name].value
    return OTHER[type(value)](value) if type(value) in OTHER else [1] if isinstance(value, list) else "other"


def test_no_setting_is_there_and_gone():
    assert not REMOVED.keys() & {name for name, _ in list_settings()}


def test_a_flag_or_a_file_that_names_one_gets_one_line_with_what_decides_now(tmp_path, capsys):
    path = tmp_path / "config.yaml"  # of no run
    path.write_text(yaml.safe_dump(nest_settings(CONSTANTS)))

    for flags, place in (([f"--{name}=1" for name in REMOVED], "--"), ([f"--config={path}"], f"{path}: ")):
        assert main(["--mode=check", "--dataset=d", *flags]) == 2
        lines = {f"finestsam: {place}{name} is gone: {removed.decides}" for name, removed in REMOVED.items()}
        assert set(capsys.readouterr().err.splitlines()) == lines


def test_a_run_that_has_them_goes_on_with_what_holds_now(tmp_path):
    run = write_run(tmp_path / "run")

    for flags in ([f"--resume={run}"], [f"--config={run / 'config.yaml'}"]):
        config = parse_command_line(["--mode=train", *flags])[1]
        assert (config.num_epochs, config.dataset.path) == (7, "d")


def test_a_run_with_other_values_is_refused_with_the_file_and_both(tmp_path):
    changed = {name: change(name) for name in REMOVED}
    run = write_run(tmp_path / "run", **changed)

    with pytest.raises(UserError) as caught:
        parse_command_line(["--mode=train", f"--resume={run}"])

    assert set(str(caught.value).splitlines()) == {
        f"{run / 'config.yaml'}: {name} is {changed[name]} there, and every run has {removed.value} now: "
        f"{removed.decides}"
        for name, removed in REMOVED.items()
    }


@pytest.mark.parametrize(
    ("labels", "unlabelled", "is_kept"),
    [("complete", "background", True), ("partial", "ignore", True), ("complete", "ignore", False)],
)
def test_pixels_without_a_label_are_what_the_labels_say(labels, unlabelled, is_kept):
    settings = {"dataset.labels": labels, "semantic.unlabelled": unlabelled}

    kept, problems = drop_removed(settings)

    assert kept == {"dataset.labels": labels}
    assert (problems == []) == is_kept


def test_a_setting_with_another_name_is_reported_and_taken_over_from_a_run(tmp_path, capsys):
    assert not RENAMED.keys() & {name for name, _ in list_settings()}
    assert main(["--mode=check", "--dataset=d", "--evaluate.battery=true"]) == 2
    assert capsys.readouterr().err == "finestsam: --evaluate.battery is called evaluate.all_prompts now\n"
    assert drop_removed({"evaluate.battery": True}) == ({"evaluate.all_prompts": True}, [])
