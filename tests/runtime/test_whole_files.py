import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import files_limited_to, list_names

from finestsam.images.files import write_image
from finestsam.runtime.whole_files import (
    remove_unfinished,
    replacing,
    replacing_set,
    write_bytes,
    write_json,
    write_text,
)

PACKAGE = Path(__file__).parents[2] / "finestsam"


def test_what_is_written_is_there_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "é\n")
    write_bytes(tmp_path / "b", b"x")
    write_json(tmp_path / "c.json", {"a": [1, 2.5, None]}, indent=1)

    assert list_names(tmp_path) == ["a.txt", "b", "c.json"]
    assert (tmp_path / "a.txt").read_bytes() == "é\n".encode()
    assert json.loads((tmp_path / "c.json").read_text()) == {"a": [1, 2.5, None]}


def test_the_name_of_a_file_that_is_no_utf_8_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "a.csv", os.fsdecode(b"\xff.png"))

    assert (tmp_path / "a.csv").read_bytes() == b"\xff.png"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 100_000),
        lambda path: write_json(path, list(range(100_000))),
        lambda path: write_image(path, np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)),
    ],
)
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, write):
    path = tmp_path / "a.png"
    path.write_text("old")

    with files_limited_to(10_000), pytest.raises(OSError, match="File too large"):
        write(path)

    assert path.read_text() == "old"
    assert list_names(tmp_path) == ["a.png"]


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("new")
        raise ZeroDivisionError

    assert path.read_text() == "old"
    assert list_names(tmp_path) == ["a"]


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("name"), replace(*names)))

    write_text(tmp_path / "a", "x")

    assert calls == ["sync", "name", "sync"]


def test_the_old_file_gets_the_name_that_it_is_to_have(tmp_path):
    for text in ("1", "2", "3"):
        with replacing(tmp_path / "a", previous=tmp_path / "b") as partial:
            partial.write_text(text)

    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("3", "2")


def write_set(folder: Path, **texts: str) -> None:
    with replacing_set(folder, ["a", "b", "c"]) as partial:
        for name, text in texts.items():
            (partial / name).write_text(text)


def read_all(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_set_of_files_takes_the_place_of_an_older_one(tmp_path):
    (tmp_path / "other").write_text("0")
    write_set(tmp_path, a="1", b="1", c="1")
    write_set(tmp_path, b="2", c="2")

    assert read_all(tmp_path) == {"b": "2", "c": "2", "other": "0"}


def test_an_error_while_a_set_is_written_leaves_the_older_one(tmp_path):
    write_set(tmp_path, a="1", c="1")

    with pytest.raises(ZeroDivisionError), replacing_set(tmp_path, ["a", "b", "c"]) as partial:
        (partial / "a").write_text("2")
        raise ZeroDivisionError

    assert read_all(tmp_path) == {"a": "1", "c": "1"}


def test_the_last_file_of_a_set_is_there_only_with_those_that_belong_to_it(tmp_path, monkeypatch):
    write_set(tmp_path, a="1", b="1", c="1")
    replace, seen = os.replace, []

    def look_and_replace(source, target):
        seen.append((tmp_path / "c").exists())
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    write_set(tmp_path, a="2", b="2", c="2")

    assert seen == [False, False, False]
    assert read_all(tmp_path) == {"a": "2", "b": "2", "c": "2"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [{"a": -float("inf")}]])
def test_json_says_no_number_that_it_has_no_word_for(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"value": value})
    assert list_names(tmp_path) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_all_json_is_made_without_nan(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and ast.unparse(node.value) == "json":
            lines = path.read_text().splitlines()[node.lineno - 1 : node.lineno + 1]
            assert "allow_nan=False" in " ".join(lines), f"{path.name}:{node.lineno}"


WRITES_FOR_EVER = """
import sys, time
from pathlib import Path
from finestsam.runtime.whole_files import replacing, unfinished_folder
folder = Path(sys.argv[1])
with replacing(folder / "last.ckpt") as file, unfinished_folder(folder / "export.json") as part:
    file.write_text("half")
    (part / "encoder.onnx").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_only_what_killed_processes_left_unfinished_is_removed(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITES_FOR_EVER, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "ready\n"
        unfinished = list_names(tmp_path)
        assert len(unfinished) == 2
        remove_unfinished(tmp_path)
        assert list_names(tmp_path) == unfinished
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()

    with replacing(tmp_path / "own") as partial:  # of this very process
        remove_unfinished(tmp_path)
        assert list_names(tmp_path) == [partial.name]


def test_what_only_looks_unfinished_is_somebody_s_and_stays(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folders = [".thesis.4194303.tmp", f".export.json.{dead.pid}.tmp", f".thesis.{'0' * 16}.finestsam.tmp"]
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "chapter.tex").touch()
    for name in (f".last.ckpt.{dead.pid}.tmp", ".notes.tmp", "a.tmp", ".a.finestsam.tmp"):
        (tmp_path / name).touch()
    (tmp_path / f".link.{'1' * 16}.finestsam.tmp").symlink_to(tmp_path / "a.tmp")
    before = sorted(tmp_path.rglob("*"))

    remove_unfinished(tmp_path)

    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_as_long_as_the_disk_allows_can_be_written(tmp_path):
    write_text(tmp_path / ("é" * 127), "x")

    assert list_names(tmp_path) == ["é" * 127]
