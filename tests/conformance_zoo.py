"""A sound dataset to break in one place, and the real command to read it with."""

import copy
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from finestsam.cli import main
from finestsam.images.files import write_image

HEIGHT, WIDTH = 120, 160
# Rectangles as x, y, width, height: three on the first image, one on the second.
BOXES = {1: (10, 20, 40, 30), 2: (80, 20, 30, 50), 3: (20, 70, 50, 40), 4: (30, 30, 60, 60)}
MEMORY_BYTES = 3_000_000_000


@dataclass
class Outcome:
    """What `--mode check` predicted."""

    code: int
    out: str
    err: str
    report: dict

    @property
    def usable(self) -> dict:
        """The ids that would be trained on, with area and box."""
        return {entry["id"]: (entry["area"], entry["box"]) for entry in self.report["usable"]}

    @property
    def skipped(self) -> dict:
        return {entry["id"]: entry["code"] for entry in self.report["skipped"]}

    @property
    def skipped_images(self) -> dict:
        findings = self.report["findings"]
        return {finding["file"]: finding["code"] for finding in findings if finding["action"] == "skipped"}

    @property
    def remarks(self) -> list[str]:
        return [finding["code"] for finding in self.report["findings"] if finding["action"] == "kept"]

    def message(self, code: str) -> str:
        return next(finding["message"] for finding in self.report["findings"] if finding["code"] == code)


def polygon(box: tuple[int, int, int, int]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


class Zoo:
    """A dataset of two images in finestSAM's layout, whose parts tests change before `check` writes and reads it."""

    def __init__(self, root: Path, capsys):
        self.root = root / "dataset"
        self.out_dir = root / "out"
        self.images_dir = self.root / "data" / "images"
        self.annotation_file = self.root / "data" / "annotations.json"
        self.images_dir.mkdir(parents=True)
        for seed, name in enumerate(("a.png", "b.png")):
            self.write_image(name, seed)
        self.content = {
            "images": [
                {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
                for number, name in ((1, "a.png"), (2, "b.png"))
            ],
            "annotations": [
                {
                    "id": number,
                    "image_id": 2 if number == 4 else 1,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": [polygon(box)],
                    "bbox": list(box),
                    "area": box[2] * box[3],
                }
                for number, box in BOXES.items()
            ],
            "categories": [{"id": 1, "name": "parcel"}],
        }
        self._capsys = capsys

    def write_image(self, name: str, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
        path = self.images_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, pixels)
        return path

    @property
    def annotations(self) -> list[dict]:
        return self.content["annotations"]

    def add(self, number: int, **changes: object) -> None:
        """Add a copy of the first annotation with changes; a value of `...` removes the key."""
        entry = copy.deepcopy(self.annotations[0]) | {"id": number} | changes
        self.annotations.append({key: value for key, value in entry.items() if value is not ...})

    def check(self, *flags: str, text: str | bytes | None = None) -> Outcome:
        """Write the annotations and run the command in this process."""
        self.write(text)
        self._capsys.readouterr()
        code = main(self.list_arguments(*flags))
        captured = self._capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err, self._read_report())

    def check_apart(self, *flags: str, text: str | bytes | None = None, seconds: float = 300) -> Outcome:
        """The same in a process of its own that may not take much memory or time."""
        self.write(text)
        done = subprocess.run(
            [sys.executable, "-m", "finestsam", *self.list_arguments(*flags)],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=Path(__file__).parents[1],
            preexec_fn=_limit_memory,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr, self._read_report())

    def list_arguments(self, *flags: str) -> list[str]:
        fixed = ["--mode=check", f"--dataset={self.root}", f"--out_dir={self.out_dir}", "--check.samples=0"]
        return [*fixed, "--dataset.use_cache=false", *flags]

    def write(self, text: str | bytes | None = None) -> None:
        if isinstance(text, bytes):
            self.annotation_file.write_bytes(text)
        else:
            self.annotation_file.write_text(json.dumps(self.content) if text is None else text, encoding="utf-8")

    def _read_report(self) -> dict:
        path = self.out_dir / "dataset_report.json"
        return json.loads(path.read_text(), parse_constant=pytest.fail) if path.is_file() else {}


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.environ["OMP_NUM_THREADS"] = "1"


def assert_skipped(zoo: Zoo, number: int, code: str) -> Outcome:
    """Assert that one annotation alone is skipped, counted and reported, and that --strict refuses it."""
    outcome = zoo.check()
    assert outcome.code == 0
    assert outcome.skipped == {number: code}
    assert set(outcome.usable) >= set(BOXES)
    assert f"1 skipped (1 {code.replace('_', ' ')})" in outcome.out
    assert zoo.check("--strict").code == 2
    return outcome


def assert_refused(outcome: Outcome, message: str) -> None:
    """Assert one line on stderr, and exit 2."""
    assert outcome.code == 2
    assert outcome.err.startswith("finestsam: ")
    assert message in outcome.err
