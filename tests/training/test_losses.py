from dataclasses import replace

import numpy as np
import pytest
import torch

from finestsam.batch import Predictions, Prompts, Sample
from finestsam.config import LossesConfig
from finestsam.images.frames import shrink_mask
from finestsam.masks import encode_mask
from finestsam.model.resample import upscale_logits
from finestsam.tasks import losses as module
from finestsam.tasks.losses import dice_loss, focal_loss, measure_overlap, object_losses

ORIGINAL_SIZE, INPUT_SIZE, IMAGE_SIZE = (90, 120), (48, 64), 64


def render_pair(seed: int = 0, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 20, 30, generator=draw) * scale
    return logits, (torch.rand(5, 20, 30, generator=draw) > 0.6).float()


@pytest.mark.parametrize("alpha", [-1.0, 0.25, 0.8])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_focal_loss_is_the_papers_formula_in_float64(alpha, gamma):
    logits, targets = render_pair()
    x, t = logits.double(), targets.double()
    p = 1 / (1 + torch.exp(-x))
    p_t = p * t + (1 - p) * (1 - t)
    alpha_t = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1.0
    expected = (-alpha_t * (1 - p_t) ** gamma * torch.log(p_t)).mean(dim=(1, 2))

    torch.testing.assert_close(focal_loss(logits, targets, alpha, gamma).double(), expected, rtol=1e-5, atol=1e-9)


def test_dice_loss_is_the_formula_in_float64():
    logits, targets = render_pair()
    p, t = torch.sigmoid(logits.double()), targets.double()
    expected = 1 - (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)

    torch.testing.assert_close(dice_loss(logits, targets).double(), expected, rtol=1e-5, atol=1e-7)


def test_losses_of_extreme_logits_and_empty_masks_are_numbers():
    for value in (-1e4, 1e4):
        for target in (torch.zeros(1, 8, 8), torch.ones(1, 8, 8)):
            logits = torch.full((1, 8, 8), value, requires_grad=True)
            loss = focal_loss(logits, target, 0.8, 2.0) + dice_loss(logits, target)
            loss.sum().backward()
            assert torch.isfinite(loss).all()
            assert torch.isfinite(logits.grad).all()
    empty = torch.full((1, 8, 8), -50.0)
    assert float(dice_loss(empty, torch.zeros(1, 8, 8))) == pytest.approx(0, abs=1e-6)


def test_overlap_is_counted_pixel_by_pixel_and_defined_for_empty_masks():
    logits, targets = render_pair()
    masks, truth = logits.numpy() > 0, targets.numpy() > 0.5

    iou, dice = measure_overlap(logits, targets)

    expected = [(m & t).sum() / (m | t).sum() for m, t in zip(masks, truth, strict=True)]
    np.testing.assert_allclose(iou, expected, rtol=1e-6)
    np.testing.assert_allclose(dice, [2 * value / (1 + value) for value in expected], rtol=1e-6)
    nothing = torch.full((1, 4, 4), -1.0), torch.zeros(1, 4, 4)
    assert [float(value) for value in measure_overlap(*nothing)] == [1.0, 1.0]


@pytest.fixture
def sample() -> Sample:
    generator = np.random.default_rng(0)
    rles = []
    for _ in range(7):
        mask = np.zeros(ORIGINAL_SIZE, dtype=bool)
        y, x = generator.integers(0, 60, size=2)
        mask[y : y + 25, x : x + 40] = True
        rles.append(encode_mask(mask))
    image = torch.zeros(3, *INPUT_SIZE, dtype=torch.uint8)
    return Sample(1, "a.png", ORIGINAL_SIZE, INPUT_SIZE, image, Prompts(), rles, list(range(7)))


@pytest.fixture
def predictions() -> Predictions:
    draw = torch.Generator().manual_seed(3)
    logits = (torch.randn(7, 3, 16, 16, generator=draw) * 3).requires_grad_()
    return Predictions(logits, torch.rand(7, 3, generator=draw).requires_grad_())


def compute_plainly(predictions: Predictions, sample: Sample, settings: LossesConfig):
    """The same loss in one piece, with autograd through everything, over all masks."""
    from finestsam.masks import decode_rles

    truth = decode_rles(sample.rles)
    if settings.resolution == "original":
        large = upscale_logits(predictions.logits, IMAGE_SIZE, INPUT_SIZE, ORIGINAL_SIZE)
    elif settings.resolution == "input":
        large = upscale_logits(predictions.logits, IMAGE_SIZE, INPUT_SIZE, None)
    else:
        large = predictions.logits[..., :12, :16]
    if settings.resolution != "original":
        truth = torch.stack([torch.from_numpy(shrink_mask(mask.numpy(), large.shape[-2:]) > 0.5) for mask in truth])
    targets = truth[:, None].float().expand_as(large)
    focal = focal_loss(large, targets, settings.focal_alpha, settings.focal_gamma)
    dice = dice_loss(large, targets)
    combined = settings.focal_ratio * focal + settings.dice_ratio * dice
    ious, _ = measure_overlap(large, targets)
    error = (predictions.scores - ious).square().mean(dim=1)
    return combined.min(dim=1).values + settings.iou_ratio * error


@pytest.mark.parametrize("resolution", ["original", "input", "low"])
def test_the_loss_in_pieces_is_the_loss_and_the_gradient_of_the_whole(sample, predictions, resolution, monkeypatch):
    settings = LossesConfig(resolution=resolution)
    weights = torch.rand(7)
    expected = compute_plainly(predictions, sample, settings)
    (expected * weights).sum().backward()
    gradients = predictions.logits.grad.clone(), predictions.scores.grad.clone()
    predictions.logits.grad = predictions.scores.grad = None
    monkeypatch.setattr(module, "PIECE_PIXELS", 2 * 3 * 90 * 120)  # two objects a piece at original size

    found = object_losses(predictions, sample, 0, settings, IMAGE_SIZE)
    (found.total * weights).sum().backward()

    torch.testing.assert_close(found.total, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(predictions.logits.grad, gradients[0], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(predictions.scores.grad, gradients[1])


@pytest.mark.parametrize("resolution", ["input", "low"])
@pytest.mark.parametrize("part", [np.s_[40:41, 10:110], np.s_[41:43, 10:110], np.s_[30:33, 50:53], np.s_[7:8, 9:10]])
def test_a_small_or_thin_object_keeps_a_target_where_it_is(sample, predictions, resolution, part):
    mask = np.zeros((360, 480), dtype=bool)
    mask[part] = True
    sample = replace(sample, original_size=mask.shape, rles=[encode_mask(mask)])
    empty = Predictions(torch.full((1, 3, 16, 16), -9.0), torch.ones(1, 3))

    target = module._render_targets(sample.rles, sample, resolution)[0].bool().numpy()
    losses = object_losses(empty, sample, 0, LossesConfig(resolution=resolution), IMAGE_SIZE)

    assert target.any()
    assert not (target & ~(shrink_mask(mask, target.shape) > 0)).any()
    assert float(losses.iou) == 0


def test_only_the_best_mask_of_an_object_is_trained_and_all_its_scores(sample, predictions):
    found = object_losses(predictions, sample, 0, LossesConfig(), IMAGE_SIZE)
    found.total.sum().backward()

    is_trained = predictions.logits.grad.abs().sum(dim=(-2, -1)) > 0
    assert is_trained.sum(dim=1).tolist() == [1] * 7
    assert is_trained.int().argmax(dim=1).tolist() == found.best.tolist()
    assert (predictions.scores.grad != 0).all()


def test_a_chunk_takes_the_masks_of_its_own_objects(sample, predictions):
    whole = object_losses(predictions, sample, 0, LossesConfig(), IMAGE_SIZE).total
    part = Predictions(predictions.logits[3:5], predictions.scores[3:5])

    torch.testing.assert_close(object_losses(part, sample, 3, LossesConfig(), IMAGE_SIZE).total, whole[3:5])


def test_no_gradient_is_computed_where_none_is_wanted(sample, predictions):
    with torch.no_grad():
        assert not object_losses(predictions, sample, 0, LossesConfig(), IMAGE_SIZE).total.requires_grad
