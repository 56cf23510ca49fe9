"""CONFORMANCE D: paths and security.

Broken checkpoints (73): tests/model/test_weights.py; archives (76): tests/test_archive.py; poisoned caches (78):
tests/data/test_coco.py.
"""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conformance_zoo import assert_refused
from conftest import list_shown, read_only
from test_conformance_structure import SOUND

from finestsam.cli import main
from finestsam.images.files import write_image


@pytest.fixture
def secret(zoo) -> Path:
    """A sound image beside the dataset, which must not be read."""
    path = zoo.root.parent / "secret.png"
    shutil.copy(zoo.images_dir / "a.png", path)
    return path


def name_image(zoo, name: str) -> None:
    zoo.content["images"].append({"id": 3, "file_name": name, "width": 160, "height": 120})
    zoo.add(9, image_id=3)


@pytest.mark.parametrize(
    "name",
    [
        "../../../secret.png", "/etc/passwd", "C:\\secret.png", "\\\\host\\share\\secret.png", "http://host/secret.png",
        "file:///etc/passwd", "a\0b.png", "images/../../../secret.png", "..", "/", "~/secret.png",
    ],
)  # fmt: skip
def test_case_69_a_name_that_leads_outside_is_never_opened(zoo, secret, name):
    name_image(zoo, name)

    outcome = zoo.check()

    assert outcome.code == 0
    assert list(outcome.skipped_images.values())[0] in ("outside_dataset", "missing_file")
    assert outcome.skipped == {9: "image_skipped"}
    assert outcome.usable == SOUND


@pytest.mark.parametrize("name", ["../../elsewhere/c.png", "/home/me/c.png", "C:\\images\\c.png", "http://host/c.png"])
def test_case_69_its_bare_name_inside_the_dataset_is_taken_instead(zoo, name):
    zoo.write_image("sub/c.png", seed=3)
    name_image(zoo, name)

    outcome = zoo.check()

    assert outcome.usable[9] == SOUND[1]
    assert outcome.remarks == ["found_by_name"]


def test_case_70_a_link_out_of_the_dataset_is_refused_unless_allowed(zoo, secret):
    (zoo.images_dir / "c.png").symlink_to(secret)
    name_image(zoo, "c.png")

    outcome = zoo.check()

    assert outcome.skipped_images == {"c.png": "outside_dataset"}
    assert "a link that leads outside the dataset" in outcome.message("outside_dataset")
    assert zoo.check("--dataset.follow_symlinks").usable[9] == SOUND[1]


def test_case_70_links_inside_the_dataset_and_a_linked_folder_are_followed(zoo, tmp_path):
    (zoo.images_dir / "c.png").symlink_to(zoo.images_dir / "a.png")
    name_image(zoo, "c.png")
    assert zoo.check().usable[9] == SOUND[1]

    zoo.images_dir.rename(tmp_path / "images")
    zoo.images_dir.symlink_to(tmp_path / "images")
    (tmp_path / "images" / "c.png").unlink()
    assert zoo.check().usable == SOUND


SECRET = "hunter2 is the word"


@pytest.fixture
def pairs(tmp_path):
    """Return a function that writes a dataset of files beside images, and a secret beside the dataset."""
    (tmp_path / "secret").write_text(f"{SECRET}\n0 .1 .1 .9 .1 .9 .9\n")
    (tmp_path / "secret.yaml").write_text(f"names: ['{SECRET}']\n")
    shape = {"label": SECRET, "points": [[2, 2], [20, 2], [20, 20]], "shape_type": "polygon"}
    (tmp_path / "secret.json").write_text(json.dumps({"shapes": [shape], "imagePath": "a.png"}))
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[5:20, 5:20] = 255
    write_image(tmp_path / "secret.png", np.stack([mask] * 3, axis=-1))

    def write(labels: str, **contents: str | bytes) -> Path:
        root = tmp_path / "dataset"
        for name in ("images", labels):
            (root / name).mkdir(parents=True, exist_ok=True)
        for name in "ab":
            write_image(root / "images" / f"{name}.png", np.full((30, 40, 3), 9 + ord(name), dtype=np.uint8))
        for name, content in contents.items():
            (root / labels / name.replace("_", ".")).write_bytes(content.encode())
        return root

    return write


def check(root: Path, out: Path, capsys, *flags: str) -> tuple[int, str]:
    """Return the exit code of a check, and all that it says, on the screen and in its report."""
    code = main(["--mode=check", f"--dataset={root}", f"--out_dir={out}", "--check.samples=0", *flags])
    printed = capsys.readouterr()
    report = out / "dataset_report.json"
    return code, printed.out + printed.err + (report.read_text() if report.exists() else "")


LINE = "0 .1 .1 .9 .1 .9 .9"
SHAPES = '{"shapes": [{"label": "x", "points": [[2, 2], [20, 2], [20, 20]]}], "imagePath": "b.png"}'


@pytest.mark.parametrize(
    ("labels", "sound", "link", "target"),
    [
        ("labels", {"b_txt": LINE}, "labels/a.txt", "secret"),
        ("labels", {"b_txt": LINE}, "images/a.png", "secret.png"),
        ("labels", {"a_txt": LINE, "b_txt": LINE}, "classes.txt", "secret"),
        ("labels", {"a_txt": LINE, "b_txt": LINE}, "labels/obj.names", "secret"),
        ("labels", {"a_txt": LINE, "b_txt": LINE}, "data.yaml", "secret.yaml"),
        ("annotations", {"b_json": SHAPES}, "annotations/a.json", "secret.json"),
        ("annotations", {"b_json": SHAPES}, "images/a.png", "secret.png"),
        ("masks", {}, "masks/a.png", "secret.png"),
        ("masks", {}, "images/a.png", "secret.png"),
    ],
)
def test_case_70_no_file_of_a_dataset_is_a_link_out_of_it(tmp_path, capsys, pairs, labels, sound, link, target):
    root = pairs(labels, **sound)
    if labels == "masks":
        for name in "ab":
            shutil.copy(tmp_path / "secret.png", root / "masks" / f"{name}.png")
    path = root / link
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / target)

    code, text = check(root, tmp_path / "out", capsys)

    assert code == 0
    assert "a link that leads outside the dataset" in text
    assert "hunter2" not in text
    _, text = check(root, tmp_path / "out", capsys, "--dataset.follow_symlinks")
    assert "outside the dataset" not in text


def test_case_70_an_annotation_file_is_opened_behind_a_link_where_the_user_names_it(zoo, tmp_path, capsys):
    zoo.write()
    path = zoo.root / "data" / "annotations.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")

    code, text = check(zoo.root, tmp_path / "out", capsys)
    assert (
        code,
        "annotations.json: a link that leads outside the dataset; to open it, use --dataset.follow_symlinks" in text,
    ) == (
        2,
        True,
    )
    assert check(path, tmp_path / "out", capsys)[0] == 0
    assert check(zoo.root, tmp_path / "out", capsys, "--dataset.follow_symlinks")[0] == 0


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ("labels", "labels/a.txt"), ("labels", "data.yaml"), ("labels", "classes.txt"), ("labels", "images/a.png"),
        ("annotations", "annotations/a.json"), ("masks", "masks/a.png"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_case_68_pipes_and_devices_are_not_waited_for(tmp_path, capsys, pairs, labels, name, kind):
    root = pairs(labels, **{"labels": {"b_txt": LINE}, "annotations": {"b_json": SHAPES}, "masks": {}}[labels])
    if labels == "masks":
        shutil.copy(tmp_path / "secret.png", root / "masks" / "b.png")
    (root / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(root / name)
    else:
        (root / name).symlink_to("/dev/zero")

    code, text = check(root, tmp_path / "out", capsys, "--dataset.follow_symlinks")

    assert (code, "not a regular file" in text) == (0, True)


@pytest.mark.parametrize("name", ["sub\\c.png", ".\\sub\\c.png", "images\\sub\\c.png"])
def test_case_71_windows_paths_are_read(zoo, name):
    zoo.write_image("sub/c.png", seed=3)
    name_image(zoo, name)

    assert zoo.check("--strict").usable[9] == SOUND[1]


class Malice:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("flag", ["--model.checkpoint", "--resume"])
def test_case_72_code_in_a_checkpoint_is_not_run(zoo, tmp_path, capsys, flag):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / ("best.pth" if flag == "--model.checkpoint" else "last.ckpt")
    path.write_bytes(pickle.dumps(Malice(tmp_path / "made")))
    (tmp_path / "run" / "config.yaml").write_text(f"dataset: {{path: '{zoo.root}'}}\n")
    zoo.write()

    arguments = ["--mode=train", f"--dataset={zoo.root}", f"{flag}={tmp_path / 'run'}", "--device=cpu"]
    assert main([*arguments, f"--sav_dir={tmp_path / 'sav'}"]) == 2

    error = capsys.readouterr().err
    assert "weights_only" not in error
    assert "Traceback" not in error
    assert not (tmp_path / "made").exists()


def test_case_74_names_cannot_move_the_cursor_or_forge_a_line(zoo):
    name_image(zoo, "<script>\x1b[2J\nfinestsam: all is well\r.png")
    zoo.content["categories"][0]["name"] = "<b>\x1b[31mred\n"

    outcome = zoo.check()

    assert "\x1b" not in outcome.out + outcome.err
    assert not any(line.startswith("finestsam: all is well") for line in outcome.out.splitlines())
    assert "\\x1b[31mred" in outcome.out


@pytest.mark.parametrize("text", ["dataset: !!python/object/apply:os.mkdir [{}]", "a: &a [*a]", "\t- x", "[1, 2]"])
def test_case_75_code_in_yaml_is_not_run(zoo, tmp_path, text):
    config = tmp_path / "config.yaml"
    config.write_text(text.format(tmp_path / "made"))

    assert_refused(zoo.check(f"--config={config}"), "config.yaml")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("mode", ["check", "evaluate", "convert", "train"])
def test_case_77_a_folder_that_cannot_take_results_is_reported_before_the_work(zoo, tmp_path, capsys, mode):
    zoo.write()
    setting = "sav_dir" if mode == "train" else "out_dir"
    (tmp_path / "file").touch()
    for folder, message in (
        (zoo.root, "is the dataset, which is never written to"),
        (tmp_path / "file", "is a file, expected a folder"),
        (tmp_path / "file" / "below", "cannot be made"),
        (Path("/"), "is the root of the disk"),
    ):
        arguments = [f"--mode={mode}", f"--dataset={zoo.root}", f"--{setting}={folder}", "--device=cpu"]
        assert main([*arguments, "--model.type=vit_tiny_test", "--model.checkpoint=none"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes rights from root")
def test_case_77_a_folder_that_may_not_be_written_is_reported(zoo):
    zoo.out_dir.mkdir()

    with read_only(zoo.out_dir):
        assert_refused(zoo.check(), "not writable")


@pytest.mark.parametrize("mode", ["check", "evaluate", "convert", "train"])
@pytest.mark.parametrize("place", ["images", "images/new", "new"])
def test_case_77_results_do_not_lie_in_the_dataset(zoo, capsys, mode, place):
    zoo.write()
    before = sorted(zoo.root.rglob("*"))
    setting = "sav_dir" if mode == "train" else "out_dir"
    arguments = [f"--mode={mode}", f"--dataset={zoo.root}", f"--{setting}={zoo.root / place}", "--device=cpu"]

    assert main([*arguments, "--model.type=vit_tiny_test", "--model.checkpoint=none"]) == 2

    assert "the dataset, which is never written to" in capsys.readouterr().err
    assert sorted(zoo.root.rglob("*")) == before


@pytest.mark.parametrize(
    ("mode", "name"),
    [(mode, "dataset_report.json") for mode in ("check", "evaluate")] + [("check", "samples.png")]
    + [("evaluate", name) for name in ("evaluation.json", "per_image.csv", "report.html", "comparison.png")],
)  # fmt: skip
def test_case_127_what_somebody_wrote_is_not_replaced(zoo, capsys, mode, name):
    zoo.write()
    zoo.out_dir.mkdir()
    (zoo.out_dir / name).write_text("theirs")
    arguments = [f"--mode={mode}", f"--dataset={zoo.root}", f"--out_dir={zoo.out_dir}", "--device=cpu"]

    assert main([*arguments, "--model.type=vit_tiny_test", "--model.checkpoint=none", "--check.samples=2"]) == 2

    printed = f"finestsam: {zoo.out_dir / name} is not replaced: finestsam did not write it, or it was changed since; "
    assert capsys.readouterr().err.startswith(printed)
    assert (zoo.out_dir / name).read_text() == "theirs"


def test_nothing_is_written_into_the_dataset(zoo):
    zoo.write()
    before = sorted(path for path in zoo.root.rglob("*"))

    zoo.check("--dataset.use_cache=true", "--check.samples=2")

    assert sorted(path for path in zoo.root.rglob("*")) == before
    assert list_shown(zoo.out_dir) == ["dataset_report.json", "samples.png"]
