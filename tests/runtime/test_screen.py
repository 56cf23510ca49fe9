import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import list_shown

from finestsam.cli import main
from finestsam.errors import UserError
from finestsam.runtime.folders import cache_folder

ROOT = Path(__file__).parents[2]


def run(command: str, scenes: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a shell command, in which $CHECK is a check of the scenes."""
    check = (
        f"{sys.executable} -m finestsam --mode check --dataset {scenes} --out_dir {folder / 'out'} --check.samples 0"
    )
    variables = os.environ | {"CHECK": check, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=variables, capture_output=True, timeout=300, cwd=folder
    )


@pytest.mark.parametrize(
    "command",
    [
        "$CHECK | head -c 1",
        "$CHECK | true",
        "$CHECK 2>&1 | true",
        "$CHECK >&-",
        "$CHECK 2>&-",
        "$CHECK <&- >&- 2>&-",
        "exec 3>&1; $CHECK 2>&1 >&3 | true",
    ],
)
def test_an_output_that_nobody_reads_ends_no_work(scenes, tmp_path, command):
    result = run(command, scenes, tmp_path)

    assert result.returncode == 0
    assert b"Traceback" not in result.stderr
    assert b"BrokenPipe" not in result.stderr
    assert (tmp_path / "out" / "dataset_report.json").is_file()
    assert list_shown(tmp_path / "out") == ["dataset_report.json"]


def test_a_mistake_is_reported_by_the_exit_code_where_nobody_reads(scenes, tmp_path):
    assert run("$CHECK --bach_size 3 2>&-", scenes, tmp_path).returncode == 2
    assert run("$CHECK --bach_size 3 2>&1 | true", scenes, tmp_path).returncode == 2


def test_a_screen_that_knows_ascii_alone_shows_other_letters_by_their_numbers(scenes, tmp_path):
    named = tmp_path / "Übungsbilder"
    named.symlink_to(scenes)

    result = run("$CHECK --dataset Übungsbilder", scenes, tmp_path, PYTHONIOENCODING="ascii:strict")

    assert (result.returncode, result.stderr) == (0, b"")
    result = run("$CHECK --dataset Ünirgends", scenes, tmp_path, PYTHONIOENCODING="ascii:strict")
    assert result.returncode == 2
    assert b"dataset \\xdcnirgends: no such folder" in result.stderr


def test_without_a_home_the_folder_that_is_missing_is_requested(monkeypatch, capsys, scenes, tmp_path):
    monkeypatch.delenv("FINESTSAM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)  # whom the system does not know

    with pytest.raises(UserError, match="set FINESTSAM_CACHE to a folder"):
        cache_folder()
    assert main(["--mode=check", f"--dataset={scenes}", f"--out_dir={tmp_path / 'out'}"]) == 2
    assert "no home folder for downloads and caches" in capsys.readouterr().err
    monkeypatch.setenv("FINESTSAM_CACHE", "~nobody_at_all/cache")
    with pytest.raises(UserError, match="set FINESTSAM_CACHE to a folder"):
        cache_folder()
