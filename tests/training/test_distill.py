"""A run with FFT attention: distilled, trained, saved, continued, used."""

import json

import pytest
import torch
from conftest import run_training
from lightning.fabric import Fabric
from torch import nn

from finestsam.cli import main
from finestsam.config import build_config
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.model.adapter import adapt_
from finestsam.model.architectures import build_sam
from finestsam.model.fft_attention import list_blocks
from finestsam.model.load import load_model
from finestsam.model.lora import list_lora
from finestsam.training.distill import distill_
from finestsam.training.hints import list_mismatches

ASKED = "--model_layer.fft_attention.blocks=all"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Weights of a SAM whose attention matters."""
    torch.manual_seed(0)
    sam = build_sam("vit_tiny_test")
    for block in sam.image_encoder.blocks:
        nn.init.normal_(block.attn.proj.weight, std=0.2)
        nn.init.normal_(block.attn.rel_pos_h, std=0.2)
    path = tmp_path_factory.mktemp("weights") / "original.pth"
    torch.save(sam.state_dict(), path)
    return path


def load_for_training(original, **settings):
    values = {"model.checkpoint": str(original), "device": "cpu", "model_layer.fft_attention.blocks": "all"}
    config = build_config(values | settings)
    loaded = load_model(config)
    loaded.replaced = adapt_(loaded.model.sam, config.model_layer)
    return loaded


def make_dataset(records):
    config = build_config({})
    return SampleDataset(records, SampleSettings(64, 32, 0, config.prompts, config.dataset))


def measure_distance(loaded, original, records) -> float:
    """Return how far the embeddings are from the original model's, relative."""
    images = [make_dataset(records).read_pixels(position, 0) for position in range(len(records))]
    exact = load_model(build_config({"model.checkpoint": str(original), "device": "cpu"})).model
    with torch.no_grad():
        found, expected = loaded.model.encode(images), exact.encode(images)
    return float((found - expected).norm() / expected.norm())


def test_distillation_brings_the_outputs_close_and_leaves_the_rest_alone(original, records, capsys):
    loaded = load_for_training(original)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    far = measure_distance(loaded, original, records)

    distill_(Fabric(accelerator="cpu", devices=1), loaded, make_dataset(records), steps=150)

    assert measure_distance(loaded, original, records) < 0.75 * far
    changed = {name for name, value in loaded.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".attn." in name for name in changed)
    assert loaded.replaced == {}
    assert all(weight.grad is None for weight in loaded.model.parameters())
    assert "distillation, by block: 0: " in capsys.readouterr().out


def test_random_weights_have_nothing_to_teach(original, records):
    loaded = load_for_training("none", **{"model.type": "vit_tiny_test"})
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}

    distill_(Fabric(accelerator="cpu", devices=1), loaded, make_dataset(records), steps=3)

    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.replaced == {}


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_a_run_saves_what_it_trained_and_prediction_uses_it(scenes, original, tmp_path, frozen):
    flags = [ASKED, f"--model.checkpoint={original}", "--model_layer.fft_attention.distill_steps=5"]
    run = run_training(scenes, tmp_path / "sav", *flags, f"--model_layer.freeze.image_encoder={frozen}")

    assert json.loads((run / "best.json").read_text())["fft_blocks"] == [0, 1]
    loaded = load_model(build_config({"model.checkpoint": str(run), "device": "cpu"}), prefer_runs=True)
    saved = torch.load(run / "best.pth", weights_only=True)
    assert list_blocks(saved) == [0, 1]
    last = torch.load(run / "last.ckpt", weights_only=True)["model"]
    image = next((scenes / "data" / "images").glob("*"))
    written = []
    for name in ("one", "two"):
        arguments = ["--mode=predict", f"--input={image}", f"--sav_dir={tmp_path / 'sav'}", "--device=cpu"]
        arguments += ["--generator.pred_iou_thresh=0", "--generator.stability_score_thresh=0"]
        assert main([*arguments, f"--out_dir={tmp_path / name}"]) == 0
        written.append((tmp_path / name / "predictions.json").read_text())
    assert written[0] == written[1]
    assert json.loads(written[0])["annotations"]
    weights = loaded.model.sam.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in saved.items())
    unchanged = torch.load(original, weights_only=True)
    name = "image_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(last[name], unchanged[name])  # frozen or not, it was distilled
    moved = not torch.equal(last["image_encoder.neck.0.weight"], unchanged["image_encoder.neck.0.weight"])
    assert moved == (frozen == "false")


def test_a_run_that_is_continued_keeps_its_attention(scenes, original, tmp_path):
    flags = [ASKED, f"--model.checkpoint={original}", "--model_layer.fft_attention.distill_steps=4"]
    run_training(scenes, tmp_path, "--run_name=whole", *flags)
    run_training(scenes, tmp_path, "--run_name=broken", *flags, "--max_steps=2")
    assert main(["--mode=train", f"--resume={tmp_path / 'broken'}", "--max_steps=0"]) == 0

    whole, broken = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["model"] for name in ("whole", "broken")
    )

    assert list_blocks(broken) == [0, 1]
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())


def test_low_rank_additions_stay_nothing_in_distillation_and_train_afterwards(scenes, original, records, tmp_path):
    settings = {"model_layer.lora.rank": 2}
    loaded = load_for_training(original, **settings)

    distill_(Fabric(accelerator="cpu", devices=1), loaded, make_dataset(records), steps=3)

    wide = [layer.lora_B.weight for _, layer in list_lora(loaded.model.sam)]
    assert len(wide) == 4
    assert all((weight == 0).all() for weight in wide)
    flags = [ASKED, f"--model.checkpoint={original}", "--model_layer.fft_attention.distill_steps=3"]
    flags += ["--model_layer.freeze.image_encoder=true", "--model_layer.lora.rank=2"]
    run = run_training(scenes, tmp_path, *flags, "--run_name=run")
    assert list_blocks(torch.load(run / "best.pth", weights_only=True)) == [0, 1]
    # It would go with weights that have no such attention.
    assert not (run / "adapter").exists()


def test_an_untaught_replacement_in_a_frozen_encoder_is_named():
    settings = {"model_layer.fft_attention.blocks": "global", "model_layer.fft_attention.distill_steps": 0}

    warnings = list_mismatches(build_config(settings), starts_from_nothing=False)

    assert "nothing teaches what stands in" in " ".join(warnings)
    assert not list_mismatches(build_config({"model_layer.fft_attention.blocks": "global"}), False)
