import pytest
import torch
from torch.nn import functional as F

from finestsam.data.synthetic import render_scene
from finestsam.model.architectures import build_sam, make_waves


def test_waves_are_orthogonal_and_tell_all_of_a_patch():
    waves = make_waves(4).double().flatten(1)

    products = waves @ waves.T
    torch.testing.assert_close(products, torch.diag(products.diag()), rtol=0, atol=1e-5)
    assert torch.linalg.matrix_rank(waves) == 48


def test_the_first_waves_are_the_loudest():
    norms = make_waves(16).flatten(1).norm(dim=1)

    assert (norms.diff() >= -1e-5).all()  # the quieter a wave is, the more it is amplified


def test_patches_begin_with_numbers_of_about_one_size():
    """Random filters see the brightness of a patch, all of them; the spectrum of images is made even."""
    torch.manual_seed(0)
    sam = build_sam("vit_tiny")
    scenes = [torch.from_numpy(render_scene(0, index).image).permute(2, 0, 1).float() for index in range(10)]
    patches = sam.image_encoder.patch_embed((torch.stack(scenes) - sam.pixel_mean) / sam.pixel_std)

    deviations = patches.flatten(0, 2).std(dim=0)

    assert deviations.min() > 0.1 and deviations.max() < 2.5


@pytest.mark.parametrize("model_type", ["vit_tiny", "vit_tiny_test"])
def test_blocks_and_neck_begin_by_passing_on_what_they_get(model_type):
    encoder = build_sam(model_type).image_encoder
    side = encoder.img_size // 16
    tokens = torch.randn(1, side, side, encoder.pos_embed.shape[-1])

    passed = tokens
    for block in encoder.blocks:
        passed = block(passed)

    torch.testing.assert_close(passed, tokens)
    narrow = encoder.neck[1](encoder.neck[0](tokens.permute(0, 3, 1, 2)))
    torch.testing.assert_close(encoder.neck[2](narrow), narrow)


def test_an_encoder_from_nothing_shows_images_apart():
    torch.manual_seed(0)
    encoder = build_sam("vit_tiny").image_encoder
    images = F.interpolate(torch.rand(2, 3, 32, 32), size=encoder.img_size)

    with torch.no_grad():
        first, second = encoder(images)

    assert (first - second).abs().mean() > 0.3
