"""Every way to adapt, through the real command: a step, the files, and the same outputs from each of them."""

import itertools
from pathlib import Path

import pytest
import torch
from conftest import FROM_SCRATCH, run_training

from finestsam.batch import Prompts
from finestsam.cli import main
from finestsam.config import build_config
from finestsam.model.adapter import adapt_
from finestsam.model.architectures import build_sam
from finestsam.model.heads import ClassHead
from finestsam.model.load import load_model
from finestsam.model.sam import FinestSam
from finestsam.tasks.masks import MasksTask
from finestsam.training.optim import build_optimizer
from finestsam.training.trainable import freeze_, trains_encoder

FROZEN = {"model_layer.freeze.image_encoder": True, "model_layer.freeze.prompt_encoder": True}
WAYS = {
    "decoder": FROZEN,
    "everything": {"model_layer.freeze.image_encoder": False, "model_layer.freeze.prompt_encoder": False},
    "recomputed": {"model_layer.freeze.image_encoder": False, "model_layer.recompute_encoder": True},
    "last block": FROZEN | {"model_layer.thaw.blocks": 1},
    "last block alone": FROZEN | {"model_layer.thaw.blocks": 1, "model_layer.freeze.mask_decoder": True},
    "lora": FROZEN | {"model_layer.lora.rank": 2, "model_layer.lora.dropout": 0.1},
    "lora, recomputed": FROZEN | {"model_layer.lora.rank": 2, "model_layer.recompute_encoder": True},
    "lora alone": FROZEN | {
        "model_layer.lora.rank": 2, "model_layer.lora.encoder": "all", "model_layer.lora.decoder": "all",
        "model_layer.freeze.mask_decoder": True,
    },
    "lora of the decoder": FROZEN | {
        "model_layer.lora.rank": 1, "model_layer.lora.encoder": "none", "model_layer.lora.decoder": "attention",
        "model_layer.freeze.mask_decoder": True,
    },
    "lora below a whole block": FROZEN | {"model_layer.lora.rank": 2, "model_layer.thaw.blocks": 1},
    "classes": FROZEN | {"task": "classes"},
    "classes, lora alone": FROZEN | {
        "task": "classes", "model_layer.lora.rank": 2, "model_layer.lora.decoder": "all",
        "model_layer.freeze.mask_decoder": True,
    },
    "fft attention": FROZEN | {"model_layer.fft_attention.blocks": "all", "model_layer.fft_attention.distill_steps": 2},
    "fft attention of some blocks, low ranks": FROZEN | {  # which no adapter's folder can hold
        "model_layer.fft_attention.blocks": "global", "model_layer.fft_attention.distill_steps": 2,
        "model_layer.lora.rank": 2,
    },
    "fft attention, classes, everything": {
        "task": "classes", "model_layer.fft_attention.blocks": "windowed", "model_layer.freeze.image_encoder": False,
    },
    "slower encoder": {"model_layer.freeze.image_encoder": False, "opt.rates.image_encoder": 0.1},
}  # fmt: skip
QKV = "image_encoder.blocks.0.attn.qkv.weight"
BRIEF = ["--max_steps=2", "--dataset.val_size=0", "--opt.learning_rate=0.01", "--sched.LambdaLR.warmup_steps=0"]


def as_flags(values: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def output(model: FinestSam) -> torch.Tensor:
    torch.manual_seed(0)
    size = model.image_size
    image = torch.randint(0, 255, (3, size, size * 3 // 4), dtype=torch.uint8)
    prompts = Prompts(points=torch.rand(3, 1, 2) * size / 2, labels=torch.ones(3, 1))
    with torch.no_grad():
        predictions = model.eval()(model.encode([image]), prompts)
    parts = (predictions.logits, predictions.scores, predictions.class_logits)
    return torch.cat([part.flatten() for part in parts if part is not None])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(build_sam("vit_tiny_test").state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("way", "multimask_output", "image_size"),
    [(way, True, 64) for way in WAYS]
    + [
        pytest.param(way, False, 96, marks=[] if way in ("decoder", "classes, lora alone") else pytest.mark.slow)
        for way in WAYS
    ],
)
def test_the_files_give_the_outputs_of_the_trained_model(scenes, tmp_path, base, way, multimask_output, image_size):
    values = WAYS[way] | {"multimask_output": multimask_output, "model.image_size": image_size}
    flags = [f"--model.checkpoint={base}", *as_flags(values), *BRIEF]

    run = run_training(scenes, tmp_path / "sav", *flags)

    exact = {"precision": "32-true"}
    config = build_config(values | exact | {"model.checkpoint": str(base), "model.image_size": image_size})
    trained = load_model(config).model
    unchanged = output(trained)
    adapt_(trained.sam, config.model_layer)
    state = torch.load(run / "last.ckpt", weights_only=True)
    trained.sam.load_state_dict(state["model"])
    if "classes" in way:
        trained.class_head = ClassHead(32, 1 + len(state["categories"]))
        trained.class_head.load_state_dict(state["class_head"])
    expected = output(trained)
    assert (expected[: len(unchanged)] - unchanged).abs().max() > 1e-3
    files = [run / "best.pth"] + ([run / "adapter"] if "lora" in way else [])
    assert (run / "adapter").exists() == ("lora" in way)
    for path in files:
        loaded = load_model(build_config(exact | {"model.checkpoint": str(path)}), prefer_runs=True)
        assert loaded.model.image_size == image_size
        torch.testing.assert_close(output(loaded.model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "way",
    ["lora", "slower encoder"]
    + [
        pytest.param(way, marks=pytest.mark.slow) for way in ("lora below a whole block", "last block alone", "classes")
    ],
)
def test_a_run_goes_on_exactly(scenes, tmp_path, base, way):
    flags = [f"--model.checkpoint={base}", *as_flags(WAYS[way]), *BRIEF]
    whole = run_training(scenes, tmp_path / "whole", *flags, "--max_steps=4")
    broken = run_training(scenes, tmp_path / "broken", *flags)
    assert main(["--mode=train", f"--resume={broken}", "--max_steps=4"]) == 0

    first, second = (torch.load(run / "last.ckpt", weights_only=True)["model"] for run in (whole, broken))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_run_is_not_continued_with_other_layers(scenes, tmp_path, base, capsys):
    flags = [f"--model.checkpoint={base}", *as_flags(WAYS["lora"]), *BRIEF]
    run = run_training(scenes, tmp_path, *flags)

    assert main(["--mode=train", f"--resume={run}", "--max_steps=4", "--model_layer.lora.rank=4"]) == 2
    assert "model_layer.lora.rank is 4, the run has 2" in capsys.readouterr().err


def test_original_weights_come_back_with_low_rank_additions_too(scenes, tmp_path, base, monkeypatch):
    rising = itertools.count()
    names = ("val_per_mask_iou", "val_per_mask_dice", "val_best_iou")
    monkeypatch.setattr(MasksTask, "_validate_prompts", lambda *_: dict.fromkeys(names, next(rising) / 100))
    flags = [f"--model.checkpoint={base}", *as_flags(WAYS["lora"]), *BRIEF]
    flags += ["--dataset.val_size=0.2", "--evaluate.generator=false"]
    plain = run_training(scenes, tmp_path / "plain", *flags)
    blended = run_training(scenes, tmp_path / "blended", *flags, "--opt.keep_original=0.5")

    original, best, result = (torch.load(path) for path in (base, plain / "best.pth", blended / "best.pth"))
    assert not torch.equal(best[QKV], original[QKV])
    for name, value in result.items():
        torch.testing.assert_close(value, torch.lerp(best[name], original[name], 0.5), rtol=1e-5, atol=1e-6)
    assert (plain / "adapter").exists()
    assert not (blended / "adapter").exists()


def test_no_adapter_is_written_that_has_no_weights_underneath(scenes, tmp_path):
    run = run_training(scenes, tmp_path, *as_flags(WAYS["lora"]), *BRIEF)

    assert not (run / "adapter").exists()


def train_names(**values: object) -> set[str]:
    model = FinestSam(build_sam("vit_tiny_test"))
    config = build_config(FROZEN | {name.replace("__", "."): value for name, value in values.items()})
    adapt_(model.sam, config.model_layer)
    freeze_(model, config)
    return {name.removeprefix("sam.") for name, weight in model.named_parameters() if weight.requires_grad}


def test_thawing_trains_what_it_says():
    decoder = train_names()
    assert not any(name.startswith("image_encoder") for name in decoder)
    last = train_names(model_layer__thaw__blocks=1) - decoder
    assert {name.split(".")[1] for name in last} == {"blocks", "neck"}
    assert {name.split(".")[2] for name in last if ".blocks." in name} == {"1"}


def test_the_image_encoder_and_heads_have_rates_of_their_own():
    model = FinestSam(build_sam("vit_tiny_test"))
    model.class_head, model.training_head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    names = {id(weight): name for name, weight in model.named_parameters()}
    opt = build_config({"opt.learning_rate": 0.1, "opt.rates.image_encoder": 0.2, "opt.head_learning_rate": 0.3}).opt

    groups = build_optimizer(model, opt).param_groups

    rates = {names[id(weight)]: group["lr"] for group in groups for weight in group["params"]}
    assert len(rates) == len(names)
    for name, expected in {
        "sam.image_encoder.patch_embed.proj.weight": 0.1 * 0.2,
        "sam.image_encoder.pos_embed": 0.1 * 0.2,
        "sam.image_encoder.blocks.0.attn.qkv.bias": 0.1 * 0.2,
        "sam.image_encoder.blocks.1.mlp.lin1.weight": 0.1 * 0.2,
        "sam.image_encoder.neck.0.weight": 0.1 * 0.2,
        "sam.mask_decoder.iou_token.weight": 0.1,
        "sam.prompt_encoder.no_mask_embed.weight": 0.1,
        "class_head.bias": 0.3,
        "training_head.bias": 0.1,
    }.items():
        assert rates[name] == pytest.approx(expected), name


def test_blocks_before_everything_that_trains_keep_nothing_for_a_gradient():
    model = FinestSam(build_sam("vit_tiny_test"))
    freeze_(model, build_config(FROZEN | {"model_layer.thaw.blocks": 1}))
    assert trains_encoder(model)
    kept = []
    for block in model.sam.image_encoder.blocks:
        block.register_forward_hook(lambda *_: kept.append(torch.is_grad_enabled()))
        block.norm2.register_forward_hook(lambda *_: kept.append(torch.is_grad_enabled()))

    embedding = model.encode([torch.zeros(3, 64, 64, dtype=torch.uint8)])

    assert embedding.requires_grad
    assert not kept[0] and kept[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_layer.freeze.image_encoder=false", "--model_layer.lora.rank=2"], "lora.encoder trains beside"),
        (["--model_layer.freeze.image_encoder=true", "--model_layer.lora.rank=2", "--model_layer.lora.decoder=all"],
         "lora.decoder trains beside"),
        (["--model_layer.freeze.image_encoder=false", "--model_layer.thaw.blocks=1"], "thaw is for a frozen"),
        (["--model_layer.lora.rank=2", "--model_layer.lora.encoder=none"], "no layer to adapt"),
        (["--model_layer.freeze.image_encoder=true", "--model_layer.freeze.prompt_encoder=true",
          "--model_layer.freeze.mask_decoder=true"], "nothing trains"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_together_are_refused(capsys, flags, said):
    assert main(["--mode=train", "--dataset=x", *FROM_SCRATCH, *flags]) == 2
    assert said in capsys.readouterr().err
