"""Prediction with weights that know classes of pixels."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import build_vivid_sam, list_shown
from PIL import Image

from finestsam.cli import main
from finestsam.data.synthetic import render_scene
from finestsam.images.files import write_image
from finestsam.model.card import Card, write_card
from finestsam.model.heads import SemanticHead, head_path
from finestsam.prediction.files import name_outputs

CLASSES = ["background", "disc", "square"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "best.pth"
    sam = build_vivid_sam()
    torch.save(sam.state_dict(), path)
    head = SemanticHead(sam.prompt_encoder.embed_dim, len(CLASSES))
    torch.save(head.state_dict(), head_path(path, SemanticHead))
    write_card(path, Card("vit_tiny_test", 64, False, [], task="semantic", classes=CLASSES))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with images/ of two."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for index, size in enumerate([(64, 96), (80, 60)]):
        write_image(tmp_path / "images" / f"scene_{index}.png", render_scene(0, index, size).image)
    return tmp_path


@pytest.fixture
def predict(weights, capsys):
    """Run the command and return its exit code, stdout and stderr."""

    def run(*inputs, **settings):
        words = [f"--{name}={value}" for name, value in settings.items()]
        code = main(["--mode=predict", "--input", *inputs, "--device=cpu", f"--model.checkpoint={weights}", *words])
        return code, *capsys.readouterr()

    return run


def test_each_image_gets_an_overlay_and_a_label_map(predict, folder):
    code, out, err = predict("images")

    assert (code, err) == (0, "")
    names = ["classes.json", "scene_0.classes.png", "scene_0.png", "scene_1.classes.png", "scene_1.png"]
    assert list_shown(folder / "out") == names
    assert [entry["name"] for entry in json.loads((folder / "out/classes.json").read_text())] == CLASSES
    with Image.open(folder / "out/scene_0.classes.png") as labels:
        assert labels.size == (96, 64) and np.asarray(labels).max() < len(CLASSES)


def test_a_broken_image_fails_a_strict_prediction_after_the_others_are_done(predict, folder):
    (folder / "images/scene_0.png").write_bytes(b"")

    code, _, err = predict("images")
    assert (code, err.count("skipped images/scene_0.png: an empty file, not an image")) == (0, 1)
    code, out, _ = predict("images", strict="true")

    assert code == 2 and "1 images" in out
    assert list_shown(folder / "out") == ["classes.json", "scene_1.classes.png", "scene_1.png"]


def test_resume_is_refused_in_one_line(predict, folder):
    code, _, err = predict("images", resume="auto")

    assert code == 2
    assert err == "finestsam: --resume: weights with classes for pixels predict every image anew; leave it out\n"


def test_outputs_beside_the_images_are_not_predicted_the_next_time(predict, folder):
    shutil.copy("images/scene_0.png", "images/scene_0.jpg")
    before = set(list_shown(folder / "images"))

    outs = [predict("images", out_dir="images")[1] for _ in range(2)]

    assert all("3 images, " in out for out in outs)
    assert sorted(set(list_shown(folder / "images")) - before) == [
        "classes.json",
        "scene_0.finestsam.classes.png",
        "scene_0.finestsam.png",
        "scene_0_2.finestsam.classes.png",
        "scene_0_2.finestsam.png",
        "scene_1.finestsam.classes.png",
        "scene_1.finestsam.png",
    ]


@pytest.mark.parametrize("names", [("x.jpg", "x.classes.png"), ("x.classes.png", "x.jpg"), ("X.png", "x.CLASSES.png")])
@pytest.mark.parametrize("out_dir", ["images", "out"])
def test_a_label_map_and_an_overlay_never_have_the_same_name(folder, names, out_dir):
    (folder / "out").mkdir()
    paths = [folder / "images" / name for name in names]

    outputs = name_outputs(paths, folder / out_dir, (".png", ".classes.png"))

    written = [path.name.casefold() for both in outputs for path in both]
    assert len(set(written)) == 4 and not set(written) & {name.casefold() for name in names if out_dir == "images"}
