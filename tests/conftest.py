"""What the tests build: drawn scenes, a SAM of 0.2 M weights, a run of two epochs."""

import contextlib
import ctypes
import functools
import json
import os
import resource
import subprocess
from pathlib import Path

# Threads of several processes on two cores wait for each other: tests of 1 s took 40 s. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import jsonargparse
import numpy as np
import pytest
import torch
from conformance_zoo import Zoo
from segment_anything.modeling import Sam

from finestsam import cli
from finestsam.cli import main
from finestsam.config import DatasetConfig
from finestsam.data.read import read_training_set
from finestsam.data.synthetic import write_scenes
from finestsam.images.files import write_image
from finestsam.model.architectures import build_sam
from finestsam.model.sam import FinestSam
from finestsam.records import Record

FROM_SCRATCH = [
    "--model.checkpoint=none",
    "--model_layer.freeze.image_encoder=false",
    "--model_layer.freeze.prompt_encoder=false",
    "--opt.learning_rate=1e-3",
    "--precision=32-true",  # what should be the same is, on every processor, but for rounding
    "--generator.points_per_side=4",  # 16 points for each validation image in place of 1280
]


# Before a norm the gradient of a bias is rounding alone, of which AdamW makes whole steps. Runs that add up in another
# order are compared after small steps.
SMALL_STEPS = ["--opt.learning_rate=5e-5", "--opt.head_learning_rate=5e-5"]


@contextlib.contextmanager
def files_limited_to(size: int):
    """Let the system refuse to write longer files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Capability(ctypes.Structure):
    """A half of what Linux allows a thread."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextlib.contextmanager
def read_only(folder: Path):
    """Let nobody make a file in a folder; root, who may everywhere, gives that up meanwhile."""
    libc, header, halves = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (Capability * 2)()
    assert libc.capget(header, halves) == 0
    effective, mode = halves[0].effective, folder.stat().st_mode
    folder.chmod(0o500)
    halves[0].effective &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, halves) == 0
    try:
        yield
    finally:
        halves[0].effective = effective
        assert libc.capset(header, halves) == 0
        folder.chmod(mode)


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def list_shown(folder: Path) -> list[str]:
    """Return the names of the files that a folder shows: not the note of which of them finestsam wrote."""
    return [name for name in list_names(folder) if not name.startswith(".")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep the tests out of the user's cache folder, and each other's."""
    monkeypatch.setenv("FINESTSAM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session", autouse=True)
def one_parser():
    """Build the parser of the command line once for all commands, each of which finds it as it was built.

    Of a command that reads a few annotations, parsing takes nine tenths of the time, half of that to look for the
    action of each setting among all others: what was found is remembered.
    """
    parser = cli._build_parser()
    parser.parse_args([])  # which adds an action of its own, once
    built, defaults = dict(vars(parser)), [action.default for action in parser._actions]
    find = jsonargparse._subcommands.find_action_and_subcommand
    remember = functools.cache(lambda dest, exclude: find(parser, dest, exclude))

    def restore():
        vars(parser).clear()
        vars(parser).update(built)
        for action, default in zip(parser._actions, defaults, strict=True):
            action.default = default
        return parser

    def find_action(action_parser, dest, exclude=None):
        return remember(dest, exclude) if action_parser is parser else find(action_parser, dest, exclude)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli, "_build_parser", restore)
        for module in (jsonargparse._core, jsonargparse._subcommands):
            patched.setattr(module, find.__name__, find_action, raising=False)
        yield


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Plot no curves in tests that train, half of whose time they take; runs of module fixtures have them."""
    if request.path.parent.name in ("training", "evaluation"):
        monkeypatch.setattr("finestsam.training.run_folder.plot_curves", lambda *_: [])


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A dataset of six drawn scenes in finestSAM's auto-split layout; of 15 to 31 objects every third is annotated."""
    root = write_scenes(tmp_path_factory.mktemp("scenes"), count=6, seed=1, size=(96, 96))
    path = root / "data" / "annotations.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][::3]
    path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def records(scenes) -> list[Record]:
    return read_training_set(DatasetConfig(path=str(scenes), val_size=0.0, use_cache=False)).train


@pytest.fixture
def zoo(tmp_path, capsys) -> Zoo:
    return Zoo(tmp_path, capsys)


def build_vivid_sam() -> Sam:
    """Return a model of 64 pixels with random weights whose masks are no noise, always the same.

    The encoder's blocks, which would begin as ones that add nothing, add something.
    """
    torch.manual_seed(0)
    sam = build_sam("vit_tiny_test")
    for weight in sam.image_encoder.parameters():
        if not weight.count_nonzero():
            torch.nn.init.normal_(weight, std=0.3)
    for head in sam.mask_decoder.output_hypernetworks_mlps:
        head.layers[-1].weight.data *= 10
    return sam


@pytest.fixture
def tiny_sam() -> FinestSam:
    """A model of 64 pixels with random weights, always the same."""
    torch.manual_seed(0)
    return FinestSam(build_sam("vit_tiny_test"))


@pytest.fixture
def coco_folder(tmp_path):
    """Return a function that writes a plain dataset of one 12 x 10 image with the annotations given to it."""

    def write(annotations: object, **changes: object) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        write_image(tmp_path / "images" / "a.png", np.full((10, 12, 3), 128, dtype=np.uint8))
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": 12, "height": 10}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "thing"}],
        } | changes
        (tmp_path / "annotations.json").write_text(json.dumps(content))
        return tmp_path

    return write


def run_training(scenes: Path, folder: Path, *flags: str) -> Path:
    """Run the real command on the scenes with the smallest model, and return the run's folder."""
    arguments = ["--mode=train", f"--dataset={scenes}", "--model.type=vit_tiny_test", f"--sav_dir={folder}"]
    arguments += ["--device=cpu", "--num_workers=0", "--num_epochs=2", *FROM_SCRATCH, *flags]
    before = set(folder.glob("*"))
    assert main(arguments) == 0
    return next(iter(set(folder.glob("*")) - before), folder)


def run_evaluation(scenes: Path, folder: Path, *flags: str) -> dict:
    """Run the real command with the smallest model and random weights, and return the figures that it writes."""
    arguments = ["--mode=evaluate", f"--dataset={scenes}", f"--out_dir={folder}", "--model.type=vit_tiny_test"]
    arguments += ["--model.checkpoint=none", "--device=cpu", "--num_workers=0", "--generator.points_per_side=4"]
    assert main([*arguments, "--seed_device=0", *flags]) == 0
    return json.loads((folder / "evaluation.json").read_text())


def wait_for_epoch(process: subprocess.Popen) -> None:
    """Return when a run in another process has printed its first epoch."""
    assert any(line.startswith("epoch 1/") for line in iter(process.stdout.readline, "")), process.stderr.read()
