"""Read thousands of randomly broken files in one process with limited memory and a time limit per file.

Part of `make faults`. An outcome is the code of a defect, `refused` (the user gets one line), or what was read.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.mutations import (
    encode_images,
    mutate_bytes,
    mutate_image,
    mutate_tree,
    mutate_yaml,
    sample_outline,
)
from finestsam.cli import main, parse_command_line
from finestsam.config import Config, DatasetConfig, build_config, flatten_config
from finestsam.errors import Defect, UserError
from finestsam.evaluation.result_files import read_results
from finestsam.formats.layouts import find_layout
from finestsam.formats.yolo import read_names
from finestsam.images.files import (
    inspect_image,
    read_hashed_image,
    read_image,
    read_image_size,
    read_labels,
    write_image,
)
from finestsam.masks import rle_area
from finestsam.model.adapter import write_adapter
from finestsam.model.architectures import build_sam
from finestsam.model.card import Card, write_card
from finestsam.model.load import load_model
from finestsam.model.lora import mount_lora_
from finestsam.training.resume import load_state
from finestsam.training.state import Progress

EXTRA_BYTES = 2_000_000_000  # memory that reading may take, in addition to that of this process
SECONDS_FOR_ONE = 60
READ = "read"


class Hang(BaseException):
    """One file took too long. Not an Exception, so that the tested code cannot catch it."""


class Difference(Exception):
    """The result differs from the content of the file, and no error was reported."""


@dataclass
class Trial:
    """One file to read."""

    name: str  # kind of the file before it was broken
    data: bytes


@dataclass
class Tally:
    """The outcomes of many files."""

    outcomes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak_bytes: int = 0

    def describe(self, title: str) -> str:
        shown = ", ".join(f"{number} x {outcome}" for outcome, number in self.outcomes.most_common())
        cost = f"slowest {self.slowest:.1f} s, peak {self.peak_bytes / 1e6:.0f} MB"
        return f"{self.outcomes.total()} {title}: {shown}; {cost}"


def read_all(trials: Iterator[Trial], path: Path, read: Callable[[Trial, Path], str]) -> Tally:
    """Write and read each file, all in one fork of this process with limited memory.

    Args:
        path: where each file is written.
        read: returns the outcome. Any exception except Defect and UserError is a bug.
    """
    with tempfile.TemporaryDirectory() as name:
        results, current = Path(name) / "results", Path(name) / "current"
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                _read_in_fork(trials, path, read, results, current)
            os._exit(0)
        _, status, usage = os.wait4(pid, 0)
        tally = Tally(peak_bytes=usage.ru_maxrss * 1024)
        for line in results.read_text().splitlines() if results.exists() else []:
            outcome, seconds, wrong = json.loads(line)
            tally.outcomes[outcome] += 1
            tally.slowest = max(tally.slowest, seconds)
            tally.wrong += [wrong] if wrong else []
        if os.waitstatus_to_exitcode(status) != 0:
            tally.wrong.append(f"the process ended with {os.waitstatus_to_exitcode(status)} at {_keep(current, path)}")
        return tally


def _read_in_fork(trials: Iterator[Trial], path: Path, read: Callable, results: Path, current: Path) -> None:
    own_bytes = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (own_bytes + EXTRA_BYTES,) * 2)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)  # libtiff and others print warnings
    signal.signal(signal.SIGALRM, _raise_hang)
    with results.open("a", buffering=1) as file:
        for trial in trials:
            path.write_bytes(trial.data)
            shutil.copyfile(path, current)
            start, wrong = time.monotonic(), None
            signal.alarm(SECONDS_FOR_ONE)
            try:
                outcome = read(trial, path)
            except Hang:
                outcome, wrong = "hang", f"{trial.name}: more than {SECONDS_FOR_ONE} s: {_keep(current, path)}"
            except Defect as defect:
                outcome = defect.code
            except UserError as error:
                outcome = "refused"
                if len(str(error)) > 2000:
                    wrong = f"{trial.name}: a message of {len(str(error))} letters: {_keep(current, path)}"
            except BaseException as error:  # any other exception is a bug to report
                trace = "".join(traceback.format_exception(error)[-3:])[-800:]
                outcome, wrong = type(error).__name__, f"{trial.name}: {_keep(current, path)}\n{trace}"
            signal.alarm(0)
            file.write(json.dumps([outcome, time.monotonic() - start, wrong]) + "\n")


def _raise_hang(*_: object) -> None:
    raise Hang


def _keep(current: Path, path: Path) -> Path:
    """Copy a file to a place where it can be examined later, and return its path."""
    descriptor, name = tempfile.mkstemp(prefix="broken_", suffix=f"_{path.name}")
    os.close(descriptor)
    shutil.copyfile(current, name)
    return Path(name)


class BrokenFiles:
    """Broken files of every kind that finestsam reads.

    Args:
        train_briefly: trains in a subfolder of a folder, and returns the folder of the run.
    """

    def __init__(self, folder: Path, generator: np.random.Generator, train_briefly: Callable[[Path], Path]):
        self.folder, self.generator, self.train_briefly = folder / "broken", generator, train_briefly
        self.folder.mkdir(parents=True)

    def read_images(self, count: int) -> tuple[str, Tally]:
        """Read broken images of every format. An image that passes the check must load with the same size."""
        image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        image[10:30, 10:40] = (200, 30, 30)
        kinds = list(encode_images(image).items())

        def make_trials() -> Iterator[Trial]:
            for number in range(count):
                name, data = kinds[number % len(kinds)]
                yield Trial(name, mutate_image(data, self.generator))

        def read(trial: Trial, path: Path) -> str:
            for read_other in (read_image_size, read_labels, read_hashed_image):
                with contextlib.suppress(Defect):
                    read_other(path)
            facts = inspect_image(path)
            if read_image(path).shape[:2] != facts.size:
                raise Difference("the check found another size")
            return READ

        return "images", read_all(make_trials(), self.folder / "image", read)

    def read_checkpoints(self, count: int) -> tuple[str, Tally]:
        """Load broken weights, cards, adapters and states. They must load as saved, or be reported."""
        torch.manual_seed(0)
        sam = build_sam("vit_tiny_test")
        home = self.folder / "run"
        home.mkdir()
        weights = home / "best.pth"
        torch.save(sam.state_dict(), weights)
        write_card(weights, Card("vit_tiny_test", 64, True, ["thing"], {"points_per_side": 4}))
        whole = {weights: weights.read_bytes()}
        card = weights.with_suffix(".json")
        expected = {name: value.clone() for name, value in sam.state_dict().items()}
        config = build_config({"model.checkpoint": str(weights), "device": "cpu", "precision": "32-true"})
        state = torch.load(self.train_briefly(self.folder) / "last.ckpt", weights_only=True)
        mount_lora_(sam, build_config({"model_layer.lora.rank": 2}).model_layer.lora)
        adapter = write_adapter(home / "adapter", sam, str(weights))
        on_adapter = build_config({"model.checkpoint": str(adapter.parent), "device": "cpu", "precision": "32-true"})
        described = adapter.parent / "adapter_config.json"
        whole |= {path: path.read_bytes() for path in (card, adapter, described)}
        kinds = ["weights", "weights", "tensors", "card", "card", "adapter", "adapter card"]
        kinds += ["state"] * 3

        def make_trials() -> Iterator[Trial]:
            for number in range(count):
                kind = kinds[number % len(kinds)]
                source = {"weights": weights, "adapter": adapter, "card": card, "adapter card": described}.get(kind)
                if kind in ("weights", "adapter"):
                    yield Trial(kind, mutate_bytes(whole[source], self.generator))
                elif kind in ("card", "adapter card"):
                    content = mutate_tree(json.loads(whole[source]), self.generator)
                    yield Trial(kind, json.dumps(content).encode("utf-8", "surrogatepass"))
                else:
                    content = mutate_tree(state if kind == "state" else expected, self.generator, tensors=True)
                    data = io.BytesIO()
                    try:
                        torch.save(content, data)
                    except Exception:  # torch cannot save it, so no such file exists
                        continue
                    yield Trial(kind, data.getvalue())

        def read(trial: Trial, path: Path) -> str:
            if trial.name == "state":
                (self.folder / "state").mkdir(exist_ok=True)
                shutil.copyfile(path, self.folder / "state" / "last.ckpt")
                load_state(self.folder / "state", Progress)
                return f"{READ} a state"
            for target, content in whole.items():
                target.write_bytes(content)
            targets = {"adapter": adapter, "card": card, "adapter card": described}
            shutil.copyfile(path, targets.get(trial.name, weights))
            loaded = load_model(on_adapter if "adapter" in trial.name else config, prefer_runs=True)
            found = loaded.model.sam.state_dict()
            if trial.name in ("weights", "adapter") and not all(
                torch.equal(found[name], value) for name, value in expected.items()
            ):
                raise Difference("other weights were loaded")
            return f"{READ} {trial.name}"

        return "checkpoints", read_all(make_trials(), self.folder / "checkpoint", read)

    def read_yaml(self, count: int) -> tuple[str, Tally]:
        """Read broken settings files and files of class names."""
        settings = yaml.safe_dump({"mode": "check", "dataset": {"path": "d"}} | nest_settings(flatten_config(Config())))
        names = yaml.safe_dump({"path": ".", "train": "images/train", "names": {0: "nut", 1: "fig"}, "nc": 2})
        dataset = self.folder / "yolo"
        for part in ("images", "labels"):
            (dataset / part).mkdir(parents=True)
        write_image(dataset / "images" / "a.png", np.zeros((8, 8, 3), dtype=np.uint8))
        (dataset / "labels" / "a.txt").write_text("")
        (part,) = find_layout(dataset).parts.values()

        def make_trials() -> Iterator[Trial]:
            for number in range(count):
                text = settings if number % 2 else names
                yield Trial("settings" if number % 2 else "names", mutate_yaml(text, self.generator))

        def read(trial: Trial, path: Path) -> str:
            if trial.name == "names":
                shutil.copyfile(path, dataset / "data.yaml")
                return "names" if read_names(part, DatasetConfig()) else "no names"
            try:
                parse_command_line([f"--config={path}"])
            except SystemExit as error:
                if error.code != 0:
                    raise
            return READ

        return "YAML files", read_all(make_trials(), self.folder / "settings.yaml", read)

    def read_outlines(self, count: int) -> tuple[str, Tally]:
        """Read polygons with few corners and extremely long outlines, in every format that has polygons."""
        size = (600, 800)

        def make_trials() -> Iterator[Trial]:
            for number in range(count):
                kind = ("coco", "labelme", "yolo", "results")[number % 4]
                yield Trial(kind, json.dumps(sample_outline(size, self.generator)).encode())

        def read(trial: Trial, path: Path) -> str:
            polygon = json.loads(path.read_text())
            folder = self.folder / f"outline_{trial.name}"
            _write_outline(folder, trial.name, polygon, size)
            if trial.name == "results":
                (record,) = _read_records(folder)
                (found,), _ = read_results(folder / "results.json", [record], {1: "thing"}, "masks")
                return f"{READ} {bool(rle_area(found.rles[0]))}"
            arguments = ["--mode=check", f"--dataset={folder}", f"--out_dir={self.folder / 'out'}", "--check.samples=0"]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return f"exit code {main([*arguments, '--dataset.use_cache=false'])}"

        return "outlines", read_all(make_trials(), self.folder / "outline.json", read)


def nest_settings(flat: dict) -> dict:
    """Return settings by dotted name in sections, as a file of settings has them."""
    nested: dict = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        section = nested
        for key in sections:
            section = section.setdefault(key, {})
        section[last] = value
    return nested


def _write_outline(folder: Path, kind: str, polygon: list[float], size: tuple[int, int]) -> None:
    """Write a dataset of one image with one polygon."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if not (folder / "images" / "a.png").exists():
        write_image(folder / "images" / "a.png", np.zeros((*size, 3), dtype=np.uint8))
    image = {"id": 1, "file_name": "a.png", "width": size[1], "height": size[0]}
    square = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    if kind == "labelme":
        points = [polygon[index : index + 2] for index in range(0, len(polygon) - 1, 2)]
        content = {"shapes": [{"label": "a", "points": points}], "imagePath": "a.png"}
        (folder / "images" / "a.json").write_text(json.dumps(content))
    elif kind == "yolo":
        (folder / "labels").mkdir(exist_ok=True)
        shares = (number / size[1 - index % 2] for index, number in enumerate(polygon))
        (folder / "labels" / "a.txt").write_text(f"0 {' '.join(map(repr, shares))}")
    else:
        annotation = square if kind == "results" else square | {"segmentation": [polygon]}
        content = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "thing"}]}
        (folder / "annotations.json").write_text(json.dumps(content))
        (folder / "results.json").write_text(json.dumps([square | {"segmentation": [polygon], "score": 0.5}]))
        if kind == "coco":
            (folder / "results.json").unlink()


def _read_records(folder: Path) -> list:
    from finestsam.data.read import read_evaluation_set

    return read_evaluation_set(DatasetConfig(path=str(folder / "annotations.json"), use_cache=False)).val
