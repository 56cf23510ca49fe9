"""Exported weights, read by the programs that they are for."""

import hashlib
import json
import os
import shutil
import signal
import stat
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import build_vivid_sam, files_limited_to, list_shown, run_training
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from finestsam.batch import Prompts
from finestsam.cli import main
from finestsam.config import build_config
from finestsam.data.synthetic import render_scene
from finestsam.errors import UserError
from finestsam.export import onnx as onnx_files
from finestsam.export import onnx_check
from finestsam.images.frames import compute_input_size, resize_image, scale_boxes, scale_points
from finestsam.model.architectures import build_sam
from finestsam.model.card import Card, read_card, write_card
from finestsam.model.fft_attention import mount_fft_attention_
from finestsam.model.heads import SemanticHead
from finestsam.model.load import load_model
from finestsam.model.sam import FinestSam

ONNX_NAMES = ["decoder.onnx", "encoder.onnx", "export.json"]
SIZES = [(60, 90), (100, 40), (64, 64), (30, 31)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights whose masks are no noise, and its card."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(build_vivid_sam().state_dict(), path)
    write_card(path, Card("vit_tiny_test", 64, False, ["nail"], {"pred_iou_thresh": 0.25}, metrics={"a": 0.5}, step=3))
    return path


@pytest.fixture(scope="module")
def sam(weights) -> Sam:
    return load_model(build_config({"model.checkpoint": str(weights), "device": "cpu"})).model.sam


def export(weights, out_dir, form: str, *flags: str) -> int:
    return main(
        ["--mode=export", f"--model.checkpoint={weights}", f"--export.format={form}", f"--out_dir={out_dir}", *flags]
    )


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """A folder with the ONNX files."""
    for name in onnx_files.PACKAGES:
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("onnx")
    assert export(weights, folder, "onnx") == 0
    return folder


def draw(size: tuple[int, int], image_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Return an image, and as it is brought to the model."""
    image = render_scene(0, 1, size).image
    return image, resize_image(image, compute_input_size(size, image_size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("point_count", "has_box"), [(1, False), (2, False), (5, False), (0, True), (2, True)])
def test_the_onnx_files_give_what_segment_anything_gives(exported, sam, size, point_count, has_box):
    import onnxruntime

    image, image = draw(size)
    points = np.random.default_rng(0).uniform(0, 1, (point_count, 2)) * size[::-1]
    labels = np.arange(point_count) % 2
    box = np.array([5.0, 4.0, 33.0, 25.0]) if has_box else None
    mask = np.linspace(-5, 5, 256, dtype=np.float32).reshape(1, 16, 16) if point_count == 2 else None
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    expected = [
        predictor.predict(points if point_count else None, labels if point_count else None, box, mask, multimask)
        for multimask in (False, True)
    ]

    encoder, decoder = (onnxruntime.InferenceSession(exported / f"{part}.onnx") for part in ("encoder", "decoder"))
    corners = np.zeros((1, 2)) if box is None else box.reshape(2, 2)
    coords = scale_points(np.concatenate([points, corners]), size, image.shape[:2])
    embedding = encoder.run(None, {"image": image.transpose(2, 0, 1)[None].astype(np.float32)})[0]
    logits, scores = decoder.run(
        ["low_res_masks", "iou_predictions"],
        {
            "image_embeddings": embedding,
            "point_coords": coords[None].astype(np.float32),
            "point_labels": np.array([[*labels, *([-1] if box is None else [2, 3])]], dtype=np.float32),
            "mask_input": np.zeros((1, 1, 16, 16), dtype=np.float32) if mask is None else mask[None],
            "has_mask_input": np.array([0 if mask is None else 1], dtype=np.float32),
        },
    )

    np.testing.assert_allclose(logits[0], np.concatenate([part[2] for part in expected]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores[0], np.concatenate([part[1] for part in expected]), rtol=0, atol=1e-5)


def test_the_description_says_what_a_program_must_know(exported, weights):
    import onnx

    description = json.loads((exported / "export.json").read_text())

    assert list_shown(exported) == ONNX_NAMES
    assert (description["model_type"], description["image_size"]) == ("vit_tiny_test", 64)
    assert description["pixel_mean"] == [123.675, 116.28, 103.53]
    assert (description["mask_threshold"], description["masks"], description["categories"]) == (0.0, [0], ["nail"])
    assert description["generator"]["pred_iou_thresh"] == 0.25
    assert description["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert description["largest_difference"] < 1e-4 and description["smallest_iou"] > 0.999
    decoder = description["files"]["decoder.onnx"]
    assert decoder["inputs"]["point_coords"] == ["prompts", "points", 2]
    assert decoder["outputs"] == {"low_res_masks": ["prompts", 4, 16, 16], "iou_predictions": ["prompts", 4]}
    assert description["files"]["encoder.onnx"]["inputs"] == {"image": [1, 3, "height", "width"]}
    for name in ("encoder.onnx", "decoder.onnx"):
        onnx.checker.check_model(exported / name)
        assert onnx.load(exported / name).opset_import[0].version == 18
        assert os.fsencode(os.path.dirname(onnx_files.__file__)) not in (exported / name).read_bytes()


def test_files_of_other_weights_are_found_out(exported, tiny_sam):
    with pytest.raises(
        UserError, match=r"^onnxruntime does not give what torch gives: difference .*nothing is written"
    ):
        onnx_check.check_onnx(onnx_check.OnnxSam(exported), tiny_sam)


def test_files_that_fail_the_check_do_not_replace_those_before(exported, weights, tmp_path, monkeypatch, capsys):
    import onnxruntime

    folder = shutil.copytree(exported, tmp_path / "out")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda *arguments: [out * np.float32("nan") for out in run(*arguments)]
    )

    assert export(weights, folder, "onnx") == 2

    assert "onnxruntime does not give what torch gives: difference inf" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_too_large_for_the_file_lie_beside_it(exported, sam, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "MAX_WEIGHT_BYTES", 0)
    onnx_files.write_onnx(FinestSam(sam), tmp_path)

    moved = tmp_path.rename(tmp_path.with_name("moved"))

    assert list_shown(moved) == ["decoder.onnx", "decoder.onnx.data", "encoder.onnx", "encoder.onnx.data"]
    assert onnx_check.check_onnx(onnx_check.OnnxSam(moved), FinestSam(sam)).difference < 1e-4


@pytest.mark.parametrize("name", onnx_files.PACKAGES)
def test_a_missing_package_is_named_before_anything_is_done(weights, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)

    assert export(weights, tmp_path / "out", "onnx") == 2

    error = capsys.readouterr().err
    assert error.startswith("finestsam: export.format onnx: ") and error.count("\n") == 1
    assert name in error and 'first run: pip install "finestsam[onnx]"' in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("image_size", [64, 96])
def test_transformers_gives_the_same_masks(weights, tmp_path, image_size):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "out"
    assert export(weights, folder, "huggingface", f"--model.image_size={image_size}") == 0
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (folder / "config.json").stat().st_mode
    )

    model, report = transformers.SamModel.from_pretrained(folder, output_loading_info=True)
    processor = transformers.SamProcessor.from_pretrained(folder)

    assert not any(report.values()), report
    flags = {"model.checkpoint": str(weights), "model.image_size": image_size, "precision": "32-true", "device": "cpu"}
    ours = load_model(build_config(flags)).model
    for size in SIZES:
        image, image = draw(size, image_size)
        points, box = np.array([[[9.0, 20.0], [30.0, 5.0]]]), np.array([[5.0, 4.0, 33.0, 25.0]])
        inputs = processor(
            image, input_points=points[None].tolist(), input_labels=[[[1, 0]]], input_boxes=[box.tolist()],
            return_tensors="pt",
        )  # fmt: skip
        pixels = ours.sam.preprocess(torch.tensor(image).permute(2, 0, 1).float())[None]
        # Its own resizing of pixels is torchvision's.
        torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=0.05)
        prompts = Prompts(
            torch.tensor(scale_points(points, size, image.shape[:2])).float(),
            torch.tensor([[1, 0]]),
            torch.tensor(scale_boxes(box, size, image.shape[:2])).float(),
        )
        for multimask in (False, True):
            with torch.no_grad():
                expected = FinestSam(ours.sam, multimask)(ours.encode([torch.tensor(image).permute(2, 0, 1)]), prompts)
                actual = model(
                    pixel_values=pixels,
                    input_points=inputs["input_points"].float(),
                    input_labels=inputs["input_labels"],
                    input_boxes=inputs["input_boxes"].float(),
                    multimask_output=multimask,
                )
            torch.testing.assert_close(actual.pred_masks[0], expected.logits, rtol=0, atol=1e-4)
            torch.testing.assert_close(actual.iou_scores[0], expected.scores, rtol=0, atol=1e-4)


def test_the_single_mask_is_requested_where_it_was_trained(weights, tmp_path, capsys):
    pytest.importorskip("safetensors")

    assert export(weights, tmp_path, "huggingface") == 0

    assert "use these weights with multimask_output=False" in capsys.readouterr().out
    assert list_shown(tmp_path) == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_without_safetensors_the_message_says_what_to_install(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)

    assert export(weights, tmp_path, "huggingface") == 2

    assert capsys.readouterr().err == "finestsam: export.format huggingface: first run: pip install safetensors\n"


def build_stock_sam() -> Sam:
    """Return segment_anything's own model with the numbers of vit_tiny_test."""
    return Sam(
        ImageEncoderViT(
            img_size=64, embed_dim=32, depth=2, num_heads=2, out_chans=32, use_rel_pos=True, window_size=2,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), global_attn_indexes=(1,),
        ),
        PromptEncoder(embed_dim=32, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=4),
        MaskDecoder(
            transformer_dim=32, transformer=TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=8)
        ),
    )  # fmt: skip


def test_segment_anything_loads_the_plain_file_strictly(weights, sam, tmp_path, capsys):
    half = tmp_path / "half.pth"
    torch.save({f"module.{name}": value.half() for name, value in sam.state_dict().items()}, half)
    shutil.copy(weights.with_suffix(".json"), half.with_suffix(".json"))

    assert export(half, tmp_path / "out", "sam") == 0

    assert list_shown(tmp_path / "out") == ["sam.json", "sam.pth"]
    state = torch.load(tmp_path / "out" / "sam.pth", weights_only=True)
    build_stock_sam().load_state_dict(state)
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in state.values())
    for name, value in sam.state_dict().items():
        torch.testing.assert_close(state[name], value.half().float(), rtol=0, atol=0)
    card = read_card(tmp_path / "out" / "sam.pth")
    assert (card.multimask_output, card.generator, card.step) == (False, {"pred_iou_thresh": 0.25}, 3)
    assert "loads in segment_anything's modules, built as a vit_tiny_test of 64 pixels" in capsys.readouterr().out


def test_the_newest_run_is_exported_with_its_additions_merged(weights, scenes, tmp_path, capsys):
    run = run_training(
        scenes, tmp_path / "sav", f"--model.checkpoint={weights}", "--model_layer.freeze.image_encoder=true",
        "--model_layer.lora.rank=2", "--max_steps=3", "--evaluate.generator=false",
    )  # fmt: skip
    best = torch.load(run / "best.pth", weights_only=True)

    assert main(["--mode=export", "--export.format=sam", f"--sav_dir={run.parent}", f"--out_dir={tmp_path / 'a'}"]) == 0
    assert f"model: vit_tiny_test, {run / 'best.pth'}" in capsys.readouterr().out
    assert read_card(tmp_path / "a" / "sam.pth") == read_card(run / "best.pth")
    assert export(run / "adapter", tmp_path / "b", "sam") == 0

    for name in ("a", "b"):
        state = torch.load(tmp_path / name / "sam.pth", weights_only=True)
        assert state.keys() == best.keys()
        for key, value in state.items():
            torch.testing.assert_close(value, best[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["onnx", "huggingface", "sam"])
def test_fft_attention_is_refused(sam, tmp_path, capsys, form):
    for name in onnx_files.PACKAGES if form == "onnx" else ("safetensors",):
        pytest.importorskip(name)
    replaced = build_sam("vit_tiny_test")
    mount_fft_attention_(replaced, [1])
    torch.save(replaced.state_dict(), tmp_path / "fft.pth")

    assert export(tmp_path / "fft.pth", tmp_path / "out", form) == 2

    error = capsys.readouterr().err
    assert "FFT attention, which is in blocks [1] of" in error and error.count("\n") == 1
    assert list_shown(tmp_path / "out") == []


def test_mobile_sam_is_no_sam_of_transformers(tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("safetensors")
    torch.save(build_sam("vit_t", 64).state_dict(), tmp_path / "mobile_sam.pt")

    assert export(tmp_path / "mobile_sam.pt", tmp_path / "out", "huggingface") == 2
    assert "transformers' SamModel has no TinyViT, which is vit_t's image encoder" in capsys.readouterr().err
    assert export(tmp_path / "mobile_sam.pt", tmp_path / "out", "sam") == 0
    assert "loads in MobileSAM's sam_model_registry['vit_t']" in capsys.readouterr().out


def test_a_head_stays_behind_only_where_that_is_said(weights, tmp_path, capsys):
    path = tmp_path / "best.pth"
    shutil.copy(weights, path)
    classes = ["background", "nail"]
    write_card(path, Card("vit_tiny_test", 64, True, ["nail"], task="semantic", classes=classes))
    torch.save(SemanticHead(32, len(classes)).state_dict(), tmp_path / "best.semantic.pth")
    out = tmp_path / "out"

    assert export(path, out, "sam") == 2
    assert "best.pth were trained for --task semantic: no export format has a place" in capsys.readouterr().err
    assert export(path, out, "sam", "--task=semantic") == 2
    assert "task semantic: no export format has a place for its head" in capsys.readouterr().err
    assert export(path, out, "sam", "--task=masks") == 0

    card = read_card(out / "sam.pth")
    assert (card.task, card.classes, card.categories) == ("masks", [], ["nail"])


def test_what_is_exported_is_never_overwritten(weights, tmp_path, capsys):
    assert export(weights, tmp_path, "sam") == 0
    before = (tmp_path / "sam.pth").read_bytes()

    assert export(weights, tmp_path, "sam") == 0  # over those of an earlier export
    assert export(tmp_path / "sam.pth", tmp_path, "sam") == 2

    assert f"{tmp_path / 'sam.pth'} is what is exported and would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "sam.pth").read_bytes() == before


def test_an_interruption_leaves_the_files_before_and_nothing_else(weights, tmp_path, monkeypatch):
    assert export(weights, tmp_path, "sam") == 0
    before = {name: (tmp_path / name).read_bytes() for name in list_shown(tmp_path)}
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.kill(os.getpid(), signal.SIGINT))

    assert export(weights, tmp_path, "sam") == 130

    assert {name: (tmp_path / name).read_bytes() for name in list_shown(tmp_path)} == before


@pytest.mark.parametrize(
    ("form", "name", "packages"),
    [
        ("sam", "sam.pth", ()),
        ("huggingface", "model.safetensors", ("safetensors",)),
        ("onnx", "encoder.onnx", onnx_files.PACKAGES),
    ],
)
def test_a_full_disk_leaves_the_files_before_and_nothing_else(weights, tmp_path, capsys, form, name, packages):
    for package in packages:
        pytest.importorskip(package)
    assert export(weights, tmp_path, form) == 0
    before = {name: (tmp_path / name).read_bytes() for name in list_shown(tmp_path)}
    assert name in before

    with files_limited_to(100_000):
        assert export(weights, tmp_path, form) == 2

    assert f"out_dir {tmp_path}: cannot be written: " in capsys.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in list_shown(tmp_path)} == before


@pytest.mark.parametrize("name", ["sam.pth", "sam.json"])
def test_weights_of_somebody_are_not_replaced(weights, tmp_path, capsys, name):
    (tmp_path / name).write_text("theirs")

    assert export(weights, tmp_path, "sam") == 2

    assert f"{tmp_path / name} is not replaced: finestsam did not write it" in capsys.readouterr().err
    assert (list_shown(tmp_path), (tmp_path / name).read_text()) == ([name], "theirs")
