"""The semantic task from training to prediction, on the smallest model and drawn scenes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_vivid_sam, run_training
from named_shapes import write_named_shapes
from PIL import Image
from torch import nn

from finestsam.cli import main
from finestsam.config import build_config
from finestsam.data.semantic import IGNORED
from finestsam.errors import UserError
from finestsam.model.architectures import build_sam
from finestsam.model.heads import SemanticHead, head_path, load_semantic_head
from finestsam.model.load import load_model
from finestsam.model.resample import upscale_logits
from finestsam.tasks.semantic import class_dice_loss, classify, measure_classes

TASK = "--task=semantic"


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory) -> Path:
    return run_training(scenes, tmp_path_factory.mktemp("sav"), TASK, "--num_epochs=3", "--save_top_k=1")


def read_csv(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_plain_sam_and_its_head_beside_it(finished):
    card = json.loads((finished / "best.json").read_text())

    build_sam("vit_tiny_test").load_state_dict(torch.load(finished / "best.pth", weights_only=True))
    assert card["task"] == "semantic"
    assert card["classes"][0] == "background"
    assert len(card["classes"]) > 2
    assert set(card["metrics"]) == {"val_miou", "val_mdice", "val_pixel_accuracy"}
    head = load_semantic_head(finished / "best.pth", card["classes"], width=32)
    assert head.classify.out_channels == len(card["classes"])
    assert len(list(finished.glob("*-0.*.pth"))) == 2  # the best weights and their head
    assert (finished / "plots" / "cross_entropy_loss.png").is_file()


def test_the_loss_falls_and_its_parts_add_up(finished):
    rows = read_csv(finished)

    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert float(rows[3]["total_loss"]) < float(rows[1]["total_loss"])
    for row in rows[1:]:
        parts = float(row["cross_entropy_loss"]) + float(row["dice_loss"])
        assert parts == pytest.approx(float(row["total_loss"]), rel=1e-4)
    assert all(0 <= float(row["val_miou"]) <= 1 for row in rows)


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_a_resumed_run_matches_an_unbroken_one(scenes, tmp_path, frozen):
    flags = [TASK, f"--model_layer.freeze.image_encoder={frozen}", "--dataset.val_size=0.2"]
    run_training(scenes, tmp_path, "--run_name=whole", *flags)
    run_training(scenes, tmp_path, "--run_name=broken", "--max_steps=2", *flags)

    assert main(["--mode=train", f"--resume={tmp_path / 'broken'}", "--max_steps=0"]) == 0

    whole, broken = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "broken"))
    for part in ("model", "semantic_head"):
        assert all(torch.equal(value, broken[part][name]) for name, value in whole[part].items())
    assert read_csv(tmp_path / "whole")[-1]["val_miou"] == read_csv(tmp_path / "broken")[-1]["val_miou"]


def test_prediction_writes_overlays_label_maps_and_their_legend(finished, scenes, tmp_path):
    images = scenes / "data" / "images"
    arguments = ["--mode=predict", f"--input={images}", f"--model.checkpoint={finished}", "--device=cpu"]

    assert main([*arguments, f"--out_dir={tmp_path}"]) == 0

    card = json.loads((finished / "best.json").read_text())
    legend = json.loads((tmp_path / "classes.json").read_text())
    assert [entry["name"] for entry in legend] == card["classes"]
    for image in images.iterdir():
        with Image.open(image) as one, Image.open(tmp_path / f"{image.stem}.classes.png") as labels:
            assert labels.size == one.size
            assert np.asarray(labels).max() < len(legend)
        with Image.open(tmp_path / f"{image.stem}.png") as overlay:
            assert overlay.size == labels.size


def test_evaluation_repeats_what_validation_measured(finished, scenes, tmp_path):
    arguments = ["--mode=evaluate", f"--dataset={scenes}", f"--model.checkpoint={finished}", "--device=cpu"]

    assert main([*arguments, "--evaluate.split=val", f"--out_dir={tmp_path}"]) == 0

    figures = json.loads((tmp_path / "evaluation.json").read_text())
    metrics = json.loads((finished / "best.json").read_text())["metrics"]
    # The store rounds embeddings to half precision, which decides a pixel between two classes that are nearly equal.
    assert figures["miou"] == pytest.approx(metrics["val_miou"], abs=2e-3)
    assert figures["pixel_accuracy"] == pytest.approx(metrics["val_pixel_accuracy"], abs=2e-3)
    assert len((tmp_path / "per_image.csv").read_text().splitlines()) == 2


def test_training_goes_on_from_a_head_for_the_same_classes(finished, scenes, tmp_path):
    flags = [TASK, f"--model.checkpoint={finished}", "--opt.head_learning_rate=1e-9", "--opt.learning_rate=1e-9"]

    run = run_training(scenes, tmp_path, *flags)

    before, after = (
        torch.load(head_path(folder / "best.pth", SemanticHead), weights_only=True) for folder in (finished, run)
    )
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def test_a_resumed_run_keeps_the_order_of_its_head(tmp_path):
    flags = [TASK, "--max_steps=1", "--dataset.val_size=0"]
    first = write_named_shapes(tmp_path / "first", 2, categories={3: "ball", 7: "crate"})
    run = run_training(first, tmp_path / "sav", *flags)
    other = write_named_shapes(tmp_path / "other", 2, categories={3: "crate", 7: "ball"})
    run = run_training(other, tmp_path / "sav", *flags, f"--model.checkpoint={run}")

    assert main(["--mode=train", f"--resume={run}", "--max_steps=2"]) == 0

    assert json.loads((run / "best.json").read_text())["classes"] == ["background", "ball", "crate"]


def test_a_head_that_is_missing_or_wrong_is_named(finished, tmp_path):
    for name in ("best.pth", "best.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    config = build_config({"model.checkpoint": str(tmp_path), "device": "cpu"})

    with pytest.raises(UserError, match=r"best.semantic.pth is missing"):
        load_model(config, prefer_runs=True)
    torch.save(SemanticHead(32, 77).state_dict(), tmp_path / "best.semantic.pth")
    with pytest.raises(UserError, match=r"best.semantic.pth: not a head for the \d+ classes"):
        load_model(config, prefer_runs=True)
    masks = build_config({"model.checkpoint": str(tmp_path), "device": "cpu", "task": "masks"})
    assert load_model(masks, prefer_runs=True).model.semantic_head is None


def test_weights_without_a_head_cannot_tell_classes(tmp_path):
    torch.save(build_sam("vit_tiny_test").state_dict(), tmp_path / "some.pth")
    settings = {"model.checkpoint": str(tmp_path / "some.pth"), "device": "cpu", "task": "semantic"}

    with pytest.raises(UserError, match="not trained for it; --mode train --task semantic"):
        load_model(build_config(settings), prefer_runs=True)


@pytest.mark.parametrize(
    ("flags", "is_plain"),
    [
        (["--model_layer.fft_attention.blocks=all", "--model_layer.fft_attention.distill_steps=2"], False),
        (["--model_layer.freeze.image_encoder=true", "--model_layer.lora.rank=4"], True),
    ],
    ids=["FFT attention", "LoRA"],
)
def test_other_encoders_learn_with_a_head_and_predict_from_their_file_as_in_validation(
    scenes, tmp_path, flags, is_plain
):
    start = build_vivid_sam().state_dict()
    torch.save(start, tmp_path / "start.pth")
    flags = [TASK, f"--model.checkpoint={tmp_path / 'start.pth'}", "--dataset.val_size=0.4", *flags]
    flags += ["--opt.learning_rate=1e-2", "--opt.head_learning_rate=1e-2", "--sched.LambdaLR.warmup_steps=0"]
    run = run_training(scenes, tmp_path / "sav", *flags)

    trained = torch.load(run / "best.pth", weights_only=True)
    assert (set(trained) == set(start)) == is_plain
    name = "image_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(trained[name], start[name])
    figures = []
    for source in [run, *run.glob("adapter")]:
        arguments = ["--mode=evaluate", f"--dataset={scenes}", f"--model.checkpoint={source}", "--device=cpu"]
        assert main([*arguments, "--evaluate.split=val", "--dataset.val_size=0.4", f"--out_dir={tmp_path}"]) == 0
        figures.append(json.loads((tmp_path / "evaluation.json").read_text())["miou"])
    assert len(figures) == 1 + is_plain
    metrics = json.loads((run / "best.json").read_text())["metrics"]
    assert figures == pytest.approx([metrics["val_miou"]] * len(figures), abs=2e-3)


def test_a_frozen_encoder_is_prompted_once(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("FINESTSAM_CACHE", str(tmp_path / "cache"))

    run_training(scenes, tmp_path, TASK, "--model_layer.freeze.image_encoder=true")

    assert len(list((tmp_path / "cache" / "embeddings").rglob("*.f16"))) == 6


def test_a_head_sees_no_other_image_of_its_batch():
    torch.manual_seed(0)
    head = SemanticHead(32, 5)
    embeddings = torch.randn(3, 32, 4, 4)

    together = head(embeddings)

    assert together.shape == (3, 5, 16, 16)
    torch.testing.assert_close(together[1:2], head(embeddings[1:2]))


def test_a_head_learns_from_embeddings_that_are_nearly_the_same_everywhere():
    torch.manual_seed(0)
    head = SemanticHead(32, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    inside = torch.zeros(1, 8, 8, dtype=torch.int64)
    inside[:, 2:4, 3:6] = 1
    direction, everywhere = torch.randn(2, 1, 32, 1, 1)
    embedding = 5 * everywhere + 0.05 * (direction * inside[:, None] + 0.3 * torch.randn(1, 32, 8, 8))
    labels = inside.repeat_interleave(4, 1).repeat_interleave(4, 2)

    for _ in range(60):
        optimizer.zero_grad()
        measures = measure_classes(head(embedding), labels)
        measures[:, 0].sum().backward()
        optimizer.step()

    assert measures[0, 3] > 0.99


def test_classes_in_bands_are_those_of_all_logits_at_once(tiny_sam):
    torch.manual_seed(0)
    tiny_sam.semantic_head = nn.Sequential(nn.Conv2d(32, 4, 1), nn.Upsample(scale_factor=4))
    embedding = torch.randn(1, 32, 4, 4)
    input_size, size = (40, 64), (300, 480)

    expected = upscale_logits(tiny_sam(embedding, None)[0], 64, input_size, size).argmax(dim=0)

    found = classify(tiny_sam, embedding, input_size, size)
    assert (found == expected.numpy()).mean() > 0.9999  # equal logits, summed in another order
    assert found.dtype == np.uint8


def test_losses_are_those_of_the_definitions():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(-1, 2, (2, 4, 5), generator=draw)  # class 2 is in no image

    found = measure_classes(logits, labels)

    for image in range(2):
        counted = labels[image] != IGNORED
        probabilities = logits[image].softmax(0)[:, counted]
        truth = labels[image][counted]
        entropy = -probabilities.gather(0, truth[None]).log().mean()
        dices = []
        for number in (0, 1):
            inside = (truth == number).double()
            both = 2 * (probabilities[number] * inside).sum() + 1
            dices.append(1 - both / (probabilities[number].sum() + inside.sum() + 1))
        expected = [entropy, sum(dices) / 2, (probabilities.argmax(0) == truth).double().mean()]
        torch.testing.assert_close(found[image, 1:], torch.stack(expected))
        torch.testing.assert_close(found[image, 0], expected[0] + expected[1])


def test_an_image_without_labels_teaches_nothing():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.full((1, 4, 4), IGNORED)

    loss = measure_classes(logits, labels)[:, 0].sum()
    loss.backward()

    assert loss == 0
    assert class_dice_loss(logits, labels).item() == 0
    assert (logits.grad == 0).all()


def test_settings_without_a_part_in_it_are_refused(scenes, capsys):
    assert main(["--mode=train", f"--dataset={scenes}", TASK, "--opt.keep_original=0.5"]) == 2

    error = capsys.readouterr().err
    assert "opt.keep_original has no part in --task semantic" in error
