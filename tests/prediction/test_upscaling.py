import pytest
import torch
from torch.nn import functional as F

from finestsam.model.resample import upscale_logits
from finestsam.prediction.upscaling import Upscaler, find_boxes, measure_masks

# Input size and size of the image: larger, smaller, the same, and far smaller than the logits themselves.
FRAMES = [((43, 64), (120, 180)), ((64, 48), (64, 48)), ((64, 64), (64, 64)), ((20, 64), (5, 17)), ((64, 1), (300, 2))]


def sample_logits(kind: str) -> torch.Tensor:
    """Logits of 12 masks, 16 x 16: discs, noise that has islands everywhere, nothing, everything."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centres = torch.rand(12, 2, generator=generator) * 16
    discs = torch.stack([3 - ((y - a) ** 2 + (x - b) ** 2).sqrt() for a, b in centres.tolist()]) * 2
    noise = F.interpolate(torch.randn(12, 1, 5, 5, generator=generator), 16, mode="bilinear")[:, 0] * 5
    return {"discs": discs, "noise": noise, "nothing": noise - 99, "everything": noise + 99}[kind]


@pytest.mark.parametrize("kind", ["discs", "noise", "nothing", "everything"])
@pytest.mark.parametrize(("input_size", "size"), FRAMES)
def test_parts_of_masks_are_those_of_masks_upscaled_whole(kind, input_size, size):
    logits = sample_logits(kind)
    whole = upscale_logits(logits[:, None], 64, input_size, size)[:, 0]
    upscaler = Upscaler(16, 64, input_size, size)

    stability, boxes = measure_masks(upscaler, logits, offset=1.0)

    inner, outer = ((whole > cutoff).flatten(1).sum(1) for cutoff in (1.0, -1.0))
    torch.testing.assert_close(stability, inner / outer.clamp(min=1), rtol=0, atol=0)
    is_empty = ~(whole > 0).flatten(1).any(1)
    assert torch.equal(boxes[:, 2] < boxes[:, 0], is_empty)
    assert torch.equal(boxes[~is_empty], find_boxes(whole > 0)[~is_empty])
    assert torch.equal(torch.stack([upscaler.render(one) for one in logits]), whole > 0)


def test_a_small_mask_is_computed_where_it_is_alone():
    logits = torch.full((1, 16, 16), -9.0)
    logits[0, 4:6, 8:10] = 9.0

    (region,) = Upscaler(16, 64, (64, 64), (640, 640)).upscale(logits, 0.0)

    height, width = region.logits.shape
    assert max(height, width) < 640 / 3
    assert region.top < 160 < 240 < region.top + height
    assert region.left < 320 < 400 < region.left + width


def test_no_masks_are_measured_to_nothing():
    stability, boxes = measure_masks(Upscaler(16, 64, (64, 64), (10, 10)), torch.zeros(0, 16, 16), 1.0)

    assert (len(stability), boxes.shape) == (0, (0, 4))
