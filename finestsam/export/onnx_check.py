"""Compare exported files in onnxruntime with their model in torch, on images and prompts of several shapes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finestsam.batch import Prompts
from finestsam.data.synthetic import render_scene
from finestsam.errors import UserError
from finestsam.export.onnx import DECODER, DECODER_INPUTS, ENCODER
from finestsam.images.frames import compute_input_size, resize_image
from finestsam.model.sam import FinestSam
from finestsam.prediction.upscaling import Upscaler

IMAGE_SIZES = ((300, 400), (400, 260), (400, 400))  # three aspect ratios
POINT_COUNTS = (1, 2, 5)
MAX_DIFFERENCE = 1e-3
MIN_IOU = 0.999


@dataclass
class Agreement:
    """The largest difference between the files' outputs and the model's."""

    difference: float = 0.0  # of logits, relative to the largest, or of scores
    iou: float = 1.0  # smallest IoU of two masks, original frame


class OnnxSam:
    """Both files in onnxruntime.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path):
        import onnxruntime  # optional package

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3  # errors
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(folder / name, settings, providers=["CPUExecutionProvider"])
            for name in (ENCODER, DECODER)
        )

    def encode(self, image: np.ndarray) -> np.ndarray:
        """Return the embedding, 1 x C x g x g, of an image in the input frame."""
        return self.encoder.run(None, {"image": image.transpose(2, 0, 1)[None].astype(np.float32)})[0]

    def predict(self, embedding: np.ndarray, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return the logits, N x 4 x 4g x 4g, and the scores, N x 4."""
        inputs = (embedding, *_list_inputs(prompts, self.decoder.get_inputs()[3].shape))
        logits, scores = self.decoder.run(None, dict(zip(DECODER_INPUTS, inputs, strict=True)))
        return torch.from_numpy(logits), torch.from_numpy(scores)

    def describe(self) -> dict[str, Any]:
        """Return the names and shapes of each file's inputs and outputs."""
        return {
            name: {
                "inputs": {entry.name: entry.shape for entry in session.get_inputs()},
                "outputs": {entry.name: entry.shape for entry in session.get_outputs()},
            }
            for name, session in ((ENCODER, self.encoder), (DECODER, self.decoder))
        }


def _list_inputs(prompts: Prompts, mask_shape: list[int]) -> list[np.ndarray]:
    """Return the decoder's inputs for prompts: a box is two corner points; without one, a point labelled -1."""
    count = len(prompts)
    if prompts.boxes is None:
        points, labels = torch.zeros(count, 1, 2), torch.full((count, 1), -1.0)
    else:
        points, labels = prompts.boxes.view(count, 2, 2), torch.tensor([2.0, 3.0]).expand(count, 2)
    if prompts.points is not None:
        points, labels = torch.cat([prompts.points, points], dim=1), torch.cat([prompts.labels, labels], dim=1)
    has_mask = prompts.mask_logits is not None
    mask = prompts.mask_logits if has_mask else torch.zeros(mask_shape)
    return [value.float().numpy() for value in (points, labels, mask, torch.tensor([float(has_mask)]))]


def check_onnx(exported: OnnxSam, model: FinestSam) -> Agreement:
    """Return the agreement of exported files with their model, which is on the CPU in float32.

    Raises:
        UserError: they do not agree.
    """
    found = Agreement()
    # A model predicts three masks or the single one; the files predict all four.
    models = [FinestSam(model.sam, multimask_output) for multimask_output in (False, True)]
    for index, size in enumerate(IMAGE_SIZES):
        scene = render_scene(0, index, size).image
        image = resize_image(scene, compute_input_size(size, model.image_size))
        upscaler = Upscaler(model.image_size // 4, model.image_size, image.shape[:2], size)
        with torch.no_grad():
            embedding = models[0].encode([torch.tensor(image).permute(2, 0, 1)])
            own_embedding = exported.encode(image)
            for prompts in _make_prompts(image.shape[:2], model.image_size // 4, seed=index):
                parts = [part(embedding, prompts) for part in models]
                expected = [torch.cat(both, dim=1) for both in zip(*((p.logits, p.scores) for p in parts), strict=True)]
                actual = exported.predict(own_embedding, prompts)
                _compare_(found, actual, expected, upscaler)
    if found.difference >= MAX_DIFFERENCE or found.iou <= MIN_IOU:
        raise UserError(
            f"onnxruntime does not give what torch gives: difference {found.difference:.1e}, expected below "
            f"{MAX_DIFFERENCE:.0e}; IoU of masks {found.iou:.4f}, expected above {MIN_IOU}; nothing is written. Other "
            "versions of torch, onnxscript or onnxruntime may do better"
        )
    return found


def _make_prompts(size: tuple[int, int], mask_side: int, seed: int) -> Iterator[Prompts]:
    """Yield prompts of each kind for an image of (height, width) in the input frame."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)

    def sample_points(prompts: int, count: int) -> Tensor:
        return torch.rand(prompts, count, 2, generator=generator) * extent

    labels = torch.tensor([[1, 1, 0, 1, 0]])
    for count in POINT_COUNTS:
        yield Prompts(sample_points(1, count), labels[:, :count])
    boxes = sample_points(1, 2).sort(dim=1).values.flatten(1)
    yield Prompts(boxes=boxes)
    yield Prompts(sample_points(1, 2), labels[:, :2], boxes)
    yield Prompts(sample_points(3, 1), labels[:, :1].expand(3, 1))
    mask_logits = 10 * torch.randn(1, 1, mask_side, mask_side, generator=generator)
    yield Prompts(sample_points(1, 1), labels[:, :1], mask_logits=mask_logits)


def _compare_(found: Agreement, actual: tuple[Tensor, Tensor], expected: list[Tensor], upscaler: Upscaler) -> None:
    """Update `found` with the largest difference and the smallest IoU."""
    for ours, theirs in zip(expected, actual, strict=True):
        difference = ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1)).item()
        found.difference = max(found.difference, difference if math.isfinite(difference) else math.inf)
    for our_logits, their_logits in zip(expected[0].flatten(0, 1), actual[0].flatten(0, 1), strict=True):
        masks = upscaler.render(our_logits), upscaler.render(their_logits)
        union = (masks[0] | masks[1]).sum().item()
        found.iou = min(found.iou, (masks[0] & masks[1]).sum().item() / union if union else 1.0)
