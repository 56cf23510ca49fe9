"""MobileSAM's encoder of timm's blocks: its outputs, its file, and what training does with it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_training
from torch import nn

from finestsam.cli import main
from finestsam.config import ModelLayerConfig, build_config
from finestsam.errors import UserError
from finestsam.model.adapter import adapt_
from finestsam.model.architectures import build_sam
from finestsam.model.load import load_model
from finestsam.model.lora import list_lora, plain_state_dict
from finestsam.model.sam import FinestSam
from finestsam.model.saving import save_weights
from finestsam.model.weights import identify, image_size_of
from finestsam.training.trainable import freeze_

pytest.importorskip("timm")
FIRST = "image_encoder.patch_embed.seq.0"


def fill_(module: nn.Module) -> None:
    """Give every weight a value of its own, by the place of its name in the alphabet and its own place."""
    with torch.no_grad():
        for number, (name, value) in enumerate(sorted(module.state_dict().items())):
            if not value.is_floating_point():
                continue
            positions = torch.arange(value.numel(), dtype=torch.float64)
            waves = torch.sin(positions * (1.7 + number) + number).view(value.shape)
            if name.endswith("running_var"):
                waves = 0.3 + 0.1 * waves
            elif value.ndim == 1:
                waves = 1 + 0.2 * waves if name.endswith("weight") else 0.1 * waves
            elif not name.endswith("attention_biases"):
                waves = waves * (3 / value[0].numel()) ** 0.5
            value.copy_(waves)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    sam = build_sam("vit_t", 64)
    fill_(sam.image_encoder)
    # So that its outputs are of a size that gradients survive.
    for module in sam.image_encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(3.0)
    return sam.state_dict()


@pytest.fixture
def model(weights) -> FinestSam:
    torch.manual_seed(0)
    sam = build_sam("vit_t", 64)
    sam.load_state_dict(weights)
    return FinestSam(sam)


def test_outputs_are_those_of_mobile_sam():
    """The numbers are what the modules of MobileSAM's tiny_vit_sam.py predicted for these weights and this image.

    Its grid of 40, 20, 10 and 10 tokens is no multiple of the windows of 7 and 14.
    """
    encoder = build_sam("vit_t", 160).image_encoder
    fill_(encoder)
    positions = torch.arange(3 * 160 * 160, dtype=torch.float64)
    image = torch.cos(positions * 0.37 + positions**2 * 1e-7).view(1, 3, 160, 160).float()

    with torch.no_grad():
        found = encoder(image)

    assert found.shape == (1, 256, 10, 10)
    across = torch.tensor([0.42593, -0.66502, -1.49476, -0.94152, -0.54729, 0.50833])
    torch.testing.assert_close(found[0, ::51, 3, 7], across, rtol=0, atol=2e-3)
    torch.testing.assert_close(
        found[0, 7, ::3, 9], torch.tensor([-1.13498, -0.73109, -0.73293, -0.40513]), rtol=0, atol=2e-3
    )


def test_names_are_those_of_the_file_of_mobile_sam(weights):
    names = {name for name in weights if name.startswith("image_encoder.")}

    assert len(names) == 302
    assert names >= {
        f"{FIRST}.c.weight",
        f"{FIRST}.bn.running_var",
        "image_encoder.layers.0.blocks.1.conv3.bn.num_batches_tracked",
        "image_encoder.layers.2.downsample.conv2.c.weight",
        "image_encoder.layers.3.blocks.1.attn.attention_biases",
        "image_encoder.layers.3.blocks.1.mlp.norm.weight",
        "image_encoder.layers.1.blocks.0.local_conv.c.weight",
        "image_encoder.norm_head.weight",
        "image_encoder.head.bias",
        "image_encoder.neck.3.bias",
    }
    assert identify(weights) == "vit_t"
    assert image_size_of(weights) == 1024
    assert weights["image_encoder.head.weight"].shape == (1000, 320)


def test_another_tiny_vit_is_reported(weights):
    wider = weights | {"image_encoder.neck.0.weight": torch.zeros(256, 448, 1, 1)}

    with pytest.raises(UserError, match="big.pt has a TinyViT for its image encoder, but another one than MobileSAM's"):
        identify(wider, "big.pt")
    with pytest.raises(UserError, match="light.pt is a checkpoint of HQ-SAM"):
        identify(weights | {"mask_decoder.hf_token.weight": torch.zeros(1)}, "light.pt")


def test_a_file_is_loaded_for_any_size_and_saved_as_it_was(weights, tmp_path):
    save_weights(tmp_path / "mobile_sam.pt", weights)
    settings = {"model.checkpoint": str(tmp_path / "mobile_sam.pt"), "model.image_size": 96, "device": "cpu"}

    loaded = load_model(build_config(settings))

    assert (loaded.model_type, loaded.model.image_size) == ("vit_t", 96)
    assert loaded.model.encode([torch.zeros(3, 96, 70, dtype=torch.uint8)]).shape == (1, 256, 6, 6)
    again = loaded.model.sam.state_dict()
    assert list(again) == list(weights)
    assert all(torch.equal(value, again[name]) and value.dtype == again[name].dtype for name, value in weights.items())


def test_batch_norms_keep_their_statistics_while_everything_trains(model):
    freeze_(model, build_config({"model_layer.freeze.image_encoder": False}))
    model.train()
    before = {name: value.clone() for name, value in model.sam.image_encoder.named_buffers()}
    images = [torch.randint(0, 255, (3, 64, 48), dtype=torch.uint8) for _ in range(2)]

    together = model.encode(images)
    together.square().mean().backward()

    assert all(torch.equal(value, before[name]) for name, value in model.sam.image_encoder.named_buffers())
    assert all(weight.grad is not None for weight in model.sam.image_encoder.parameters())
    torch.testing.assert_close(together[1:], model.encode(images[1:]), rtol=1e-3, atol=1e-3)


def test_recomputing_changes_no_gradient(model):
    model.train()
    gradients = []
    for recomputes in (False, True):
        model.zero_grad()
        model.sam.image_encoder.recomputes = recomputes
        model.encode([torch.full((3, 64, 64), 90, dtype=torch.uint8)]).square().mean().backward()
        gradients.append(model.sam.get_parameter(f"{FIRST}.c.weight").grad.clone())

    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_blocks_count_through_all_stages_for_thawing(model):
    freeze_(model, build_config({"model_layer.thaw.blocks": 2}))
    trained = {
        name.partition(".blocks.")[0]
        for name, weight in model.sam.image_encoder.named_parameters()
        if weight.requires_grad
    }
    assert trained >= {"layers.3", "neck.0.weight"}
    assert not any(name.startswith(("layers.0", "layers.1", "layers.2", "patch_embed")) for name in trained)


@pytest.mark.parametrize(("layers", "count"), [("attention", 2 * 10), ("all", 4 * 10)])
def test_low_rank_additions_lie_beside_its_attention_and_merge(model, layers, count):
    images = [torch.full((3, 64, 64), 90, dtype=torch.uint8)]
    before = model.encode(images)

    adapt_(model.sam, ModelLayerConfig(lora=build_config({
        "model_layer.lora.rank": 4, "model_layer.lora.encoder": layers}).model_layer.lora))  # fmt: skip

    torch.testing.assert_close(model.encode(images), before, rtol=0, atol=0)
    additions = dict(list_lora(model.sam))
    assert len(additions) == count
    with torch.no_grad():
        for layer in additions.values():
            layer.lora_B.weight.normal_(std=0.05)
        merged = build_sam("vit_t", 64)
        merged.load_state_dict(plain_state_dict(model.sam))
        adapted = model.eval().encode(images)
    assert (adapted - before).abs().max() > 0.1
    # These weights make rounding a thousand times as large.
    torch.testing.assert_close(FinestSam(merged).encode(images), adapted, rtol=0, atol=5e-3)


def test_half_precision_gives_nearly_the_same(model):
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.encode([image])
        model.encoder_dtype = torch.bfloat16
        rounded = model.encode([image])

    assert torch.corrcoef(torch.stack([rounded.flatten(), exact.flatten()]))[0, 1] > 0.97


def test_fft_attention_is_refused(model):
    layers = build_config({"model_layer.fft_attention.blocks": "all"}).model_layer

    with pytest.raises(
        UserError, match="model_layer.fft_attention: MobileSAM's image encoder has no attention of SAM's"
    ):
        adapt_(model.sam, layers)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "finestsam.model.tiny_vit", raising=False)
    monkeypatch.setitem(sys.modules, "timm.models.tiny_vit", None)

    with pytest.raises(UserError, match="to use vit_t, first run: pip install timm"):
        build_sam("vit_t")


def test_a_file_of_mobile_sam_beside_us_is_taken(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights(Path("mobile_sam.pt"), weights)

    loaded = load_model(build_config({"model.type": "vit_t", "model.image_size": 64, "device": "cpu"}))

    assert loaded.path == Path("mobile_sam.pt")


@pytest.mark.parametrize("frozen", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_a_run_trains_goes_on_predicts_and_is_evaluated(weights, scenes, tmp_path, frozen):
    save_weights(tmp_path / "mobile_sam.pt", weights)
    flags = ["--model.type=vit_t", f"--model.checkpoint={tmp_path / 'mobile_sam.pt'}", "--model.image_size=64"]
    flags += [f"--model_layer.freeze.image_encoder={frozen}", "--generator.points_per_side=4", "--max_steps=3"]
    run = run_training(scenes, tmp_path / "sav", *flags)
    assert main(["--mode=train", f"--resume={run}", "--max_steps=4"]) == 0

    best = torch.load(run / "best.pth", weights_only=True)
    assert list(best) == list(weights)
    card = json.loads((run / "best.json").read_text())
    assert (card["model_type"], card["image_size"]) == ("vit_t", 64)
    last = torch.load(run / "last.ckpt", weights_only=True)["model"]
    changed = {name for name, value in last.items() if not torch.equal(value, weights[name])}
    assert any(name.startswith("mask_decoder.") for name in changed)
    assert any(name.startswith("image_encoder.") for name in changed) == (frozen == "false")
    assert not any("running" in name or ".head." in name for name in changed)
    common = [f"--model.checkpoint={run}", "--device=cpu", "--generator.points_per_side=4"]
    image = next((scenes / "data" / "images").iterdir())
    assert main(["--mode=predict", f"--input={image}", f"--out_dir={tmp_path / 'out'}", *common]) == 0
    flags = [
        f"--dataset={scenes}",
        "--evaluate.split=val",
        "--evaluate.clicks=0",
        f"--out_dir={tmp_path / 'evaluation'}",
    ]
    assert main(["--mode=evaluate", *flags, *common]) == 0


def test_it_cannot_start_from_nothing(scenes, tmp_path, capsys):
    flags = ["--mode=train", f"--dataset={scenes}", "--model.type=vit_t", "--model.checkpoint=none"]

    assert main([*flags, f"--sav_dir={tmp_path}"]) == 2

    assert "model.type vit_t cannot start from random weights" in capsys.readouterr().err
