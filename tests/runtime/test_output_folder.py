import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import list_names, list_shown, read_only

from finestsam.errors import UserError
from finestsam.runtime import folders as output_folder
from finestsam.runtime.folders import (
    WRITTEN_NAME,
    claim_output_folder,
    is_replaceable,
    make_output_folder,
    release_output_folders,
)
from finestsam.runtime.whole_files import replacing_set, write_text


@pytest.fixture(autouse=True)
def released():
    yield
    release_output_folders()


def write_all(folder: Path, *names: str) -> None:
    claim_output_folder(folder, None, names)
    for name in names:
        write_text(folder / name, f"finestsam's {name}")
    release_output_folders()


def test_what_finestsam_wrote_is_replaced_and_nothing_else(tmp_path):
    write_all(tmp_path, "a.json", "b.csv")
    write_all(tmp_path, "a.json", "b.csv")
    (tmp_path / "b.csv").write_text("corrected by hand")
    (tmp_path / "c.html").write_text("somebody's")

    claim_output_folder(tmp_path, None, ["a.json", "d.png"])
    assert [is_replaceable(tmp_path / name) for name in ("a.json", "b.csv", "c.html", "d.png")] == [
        True, False, False, True,
    ]  # fmt: skip
    for name in ("b.csv", "c.html"):
        with pytest.raises(UserError, match=f"{name} is not replaced: finestsam did not write it, or it was changed"):
            claim_output_folder(tmp_path, None, ["a.json", name])
        with pytest.raises(UserError, match=f"{name} is not replaced"):  # whoever forgot to look before
            write_text(tmp_path / name, "ours")
    assert (tmp_path / "b.csv").read_text() == "corrected by hand"
    assert (tmp_path / "c.html").read_text() == "somebody's"
    assert list_shown(tmp_path) == ["a.json", "b.csv", "c.html"]


def test_a_set_of_files_is_replaced_whole_or_not_at_all(tmp_path):
    def write_set(**texts: str) -> None:
        claim_output_folder(tmp_path, None)
        with replacing_set(tmp_path, ["a", "b", "c"]) as partial:
            for name, text in texts.items():
                (partial / name).write_text(text)

    write_set(a="1", b="1", c="1")
    write_set(a="2", c="2")
    assert list_shown(tmp_path) == ["a", "c"]
    (tmp_path / "b").write_text("somebody's")
    for texts in ({"a": "3", "b": "3", "c": "3"}, {"a": "3", "c": "3"}):
        with pytest.raises(UserError, match="b is not replaced"):
            write_set(**texts)

    assert [(tmp_path / name).read_text() for name in "abc"] == ["2", "somebody's", "2"]


def test_a_folder_that_was_moved_or_copied_is_known_again(tmp_path):
    write_all(tmp_path / "one", "a.json")
    (tmp_path / "one").rename(tmp_path / "two")

    write_all(tmp_path / "two", "a.json")


def test_a_kill_between_the_note_and_the_file_makes_neither_foreign(tmp_path, monkeypatch):
    write_all(tmp_path, "a.json")
    before = (tmp_path / "a.json").read_bytes()
    claim_output_folder(tmp_path, None)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        write_text(tmp_path / "a.json", "not put in place")
    with (tmp_path / WRITTEN_NAME).open("a") as file:
        file.write('{"name": "a.js')
    release_output_folders()

    assert (tmp_path / "a.json").read_bytes() == before
    claim_output_folder(tmp_path, None, ["a.json"])


def test_the_notes_of_many_calls_are_forgotten_but_for_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "SPARE_LINES", 5)
    claim_output_folder(tmp_path, None)
    for number in range(20):
        write_text(tmp_path / "a.json", str(number))
    release_output_folders()

    claim_output_folder(tmp_path, None, ["a.json"])

    lines = (tmp_path / WRITTEN_NAME).read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["name"] == "a.json" for line in lines)


def test_another_process_is_kept_out_until_the_end_of_this_one_however_it_ends(tmp_path):
    script = "import sys\nfrom pathlib import Path\nfrom finestsam.runtime.folders import claim_output_folder\n"
    script += "claim_output_folder(Path(sys.argv[1]), None)\nprint('ready', flush=True)\ninput()"
    other = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="another process writes into out_dir .*; wait until it ends, or stop it"):
            claim_output_folder(tmp_path, None)
    finally:
        other.kill()
        other.communicate()

    claim_output_folder(tmp_path, None)


@pytest.fixture
def dataset(tmp_path) -> Path:
    root = tmp_path / "dataset"
    (root / "data" / "images").mkdir(parents=True)
    (root / "data" / "annotations.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (root / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "way in").symlink_to(root)
    return root


@pytest.mark.parametrize(
    "place", ["", "data", "data/images", "data/images/new", "out", "../elsewhere", "../way in/out"]
)
def test_nothing_is_written_into_a_dataset_however_it_is_reached(dataset, place):
    before = sorted(dataset.parent.rglob("*"))

    with pytest.raises(UserError, match="the dataset, which is never written to; choose another --out_dir"):
        make_output_folder(dataset / place, str(dataset))

    assert sorted(dataset.parent.rglob("*")) == before


def test_nothing_is_written_among_the_images_of_an_annotation_file(dataset):
    file = dataset / "data" / "annotations.json"
    for place in ("", "images", "images/new"):
        with pytest.raises(UserError, match="the dataset, which is never written to"):
            make_output_folder(file.parent / place, str(file))
    (dataset / "data" / "images").rmdir()  # images beside the file
    for place in ("", "new"):
        with pytest.raises(UserError, match="the dataset, which is never written to"):
            make_output_folder(file.parent / place, str(file))


def test_a_folder_beside_the_dataset_is_written_into(dataset):
    (dataset / "data" / "up").symlink_to(dataset.parent)
    for place in ("out", "dataset2"):
        make_output_folder(dataset.parent / place, str(dataset))
    make_output_folder(dataset.parent, str(dataset.parent / "no such file"))
    make_output_folder(dataset / "data" / "out", str(dataset / "data" / "annotations.json"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes rights from root")
def test_a_folder_that_cannot_be_written_is_reported_for_root_too(tmp_path):
    with read_only(tmp_path), pytest.raises(UserError, match="not writable: Permission denied"):
        make_output_folder(tmp_path, None)

    make_output_folder(tmp_path, None)
    assert list_names(tmp_path) == []
