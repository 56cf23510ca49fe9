"""Attention through the Fourier transform against sums over all pairs of tokens, and as a part of a SAM."""

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention
from torch import nn

from finestsam.config import build_config
from finestsam.model.adapter import adapt_
from finestsam.model.architectures import ARCHITECTURES, build_sam
from finestsam.model.encoder import attend
from finestsam.model.fft_attention import FftAttention, choose_blocks, list_blocks, mount_fft_attention_
from finestsam.model.load import load_model, load_weights_
from finestsam.prediction.embedder import hash_encoder

SIZE = (4, 5)  # even and odd: a real transform keeps another number of frequencies


@pytest.fixture
def original() -> Attention:
    torch.manual_seed(0)
    attention = Attention(8, num_heads=2, use_rel_pos=True, input_size=SIZE)
    for name, weight in attention.named_parameters():
        nn.init.normal_(weight, std=0.5 if "rel_pos" in name else 0.4)
    return attention.double()


@pytest.fixture
def attention(original) -> FftAttention:
    return FftAttention(original)


def sample_tokens(*size: int) -> torch.Tensor:
    return torch.randn(*size, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def attend_pair_by_pair(attention: FftAttention, x: torch.Tensor) -> torch.Tensor:
    """Return what one image's tokens, H x W x C, see, from the definition in the module's docstring."""
    height, width, channels = x.shape
    q, k, v = attention.qkv(x).split(channels, dim=-1)
    offsets = [(dy, dx) for dy in range(height) for dx in range(width)]
    head_channels = channels // attention.num_heads
    seen = torch.zeros_like(x)
    for channel in range(channels):
        head = slice(channel // head_channels * head_channels, (channel // head_channels + 1) * head_channels)
        mean_query = q[..., head].mean((0, 1))
        scores = []
        for dy, dx in offsets:
            pairs = [
                q[(y + dy) % height, (x_ + dx) % width, channel] * k[y, x_, channel]
                for y in range(height)
                for x_ in range(width)
            ]
            score = attention.fft_gain[channel] * sum(pairs) / len(pairs)
            for steps, length, table in ((dy, height, attention.rel_pos_h), (dx, width, attention.rel_pos_w)):
                # From token m on, `steps` further lies on the line, or `length - steps` back.
                distances = [(m + steps) % length - m for m in range(length)]
                score = score + sum(mean_query @ table[distance + length - 1] for distance in distances) / length
            scores.append(score)
        weights = torch.stack(scores).softmax(0)
        for y in range(height):
            for x_ in range(width):
                seen[y, x_, channel] = sum(
                    weight * v[(y - dy) % height, (x_ - dx) % width, channel]
                    for weight, (dy, dx) in zip(weights, offsets, strict=True)
                )
    return attention.proj(seen)


def test_it_is_the_sum_over_all_pairs(attention):
    x = sample_tokens(2, *SIZE)

    with torch.no_grad():
        expected = torch.stack([attend_pair_by_pair(attention, image) for image in x])
        torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


def test_a_change_in_one_token_reaches_all_others(attention):
    x = sample_tokens(1, *SIZE).requires_grad_()

    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            (reached,) = torch.autograd.grad(attention(x)[0, row, column].sum(), x)
            assert (reached[0].abs().sum(-1) > 1e-6).all()


@pytest.mark.parametrize("shift", [(1, 0), (0, 2), (3, 4)])
def test_outputs_move_along_with_the_image(attention, shift):
    x = sample_tokens(2, *SIZE)

    moved = attention(x.roll(shift, (1, 2)))

    torch.testing.assert_close(moved, attention(x).roll(shift, (1, 2)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(moved, attention(x))


def test_gradients_are_finite_differences(attention):
    names, weights = zip(*attention.named_parameters(), strict=True)

    def output(x, *values):
        return torch.func.functional_call(attention, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(output, (sample_tokens(1, *SIZE).requires_grad_(), *weights))


def test_it_starts_from_the_weights_of_sam_under_their_names(original, attention):
    with torch.no_grad():
        for weight in attention.parameters():
            weight.zero_()

    output = attention.load_state_dict(original.state_dict(), strict=False)

    assert output.missing_keys == ["fft_gain"]
    assert output.unexpected_keys == []
    for name, weight in original.state_dict().items():
        assert torch.equal(attention.state_dict()[name], weight)
        assert attention.state_dict()[name].data_ptr() != weight.data_ptr()


def test_flat_correlations_leave_the_mean_of_all_values(attention):
    with torch.no_grad():
        for weight in (attention.fft_gain, attention.rel_pos_h, attention.rel_pos_w):
            weight.zero_()
        x = sample_tokens(1, *SIZE)
        values = attention.qkv(x)[..., 16:]

        expected = attention.proj(values.mean((1, 2), keepdim=True).expand_as(values))

        torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


def test_windows_see_themselves_alone(original):
    torch.manual_seed(0)
    attention = FftAttention(Attention(8, num_heads=2, use_rel_pos=True, input_size=(2, 2))).double()
    x = sample_tokens(1, 5, 4)  # the last row of windows is filled up

    found = attend(attention, x, window_size=2)

    assert found.shape == x.shape
    torch.testing.assert_close(found[:, :2, 2:], attention(x[:, :2, 2:]))
    filled = torch.cat([x[:, 4:, :2], torch.zeros_like(x[:, 4:, :2])], dim=1)
    torch.testing.assert_close(found[:, 4:, :2], attention(filled)[:, :1])


def test_half_precision_is_transformed_in_full(attention):
    attention.float()
    x = sample_tokens(1, *SIZE).float()

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(x)
    with torch.no_grad():
        exact = attention(x)

    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 2e-2 * exact.norm()


def test_a_setting_names_blocks():
    encoder = build_sam("vit_tiny").image_encoder
    windowed = [0, 2, 4, 6]

    found = {which: choose_blocks(encoder, which) for which in ("none", "global", "windowed", "all")}

    assert tuple(found["global"]) == ARCHITECTURES["vit_tiny"].global_blocks
    assert found == {"none": [], "global": [1, 3, 5, 7], "windowed": windowed, "all": list(range(8))}


def test_weights_tell_which_blocks_are_replaced_and_what_is_replaced_stays_so():
    sam = build_sam("vit_tiny_test")

    assert list_blocks(sam.state_dict()) == []
    assert list(mount_fft_attention_(sam, [1])) == [1]
    weights = {name: value + 0.1 for name, value in sam.state_dict().items()}
    assert list_blocks(weights) == [1]
    assert list(mount_fft_attention_(sam, [0, 1])) == [0]

    other = build_sam("vit_tiny_test")
    load_weights_(other, weights)
    assert list_blocks(other.state_dict()) == [1]
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())


def test_segment_anything_refuses_the_weights():
    sam = build_sam("vit_tiny_test")
    mount_fft_attention_(sam, [1])

    with pytest.raises(RuntimeError, match="blocks.1.attn.fft_gain"):
        build_sam("vit_tiny_test").load_state_dict(sam.state_dict())


def test_the_file_decides_in_prediction_and_the_settings_add_in_training(tmp_path):
    sam = build_sam("vit_tiny_test")
    mount_fft_attention_(sam, [1])
    torch.save(sam.state_dict(), tmp_path / "some.pth")
    settings = {"model.checkpoint": str(tmp_path / "some.pth"), "device": "cpu"}
    config = build_config(settings | {"model_layer.fft_attention.blocks": "windowed"})

    loaded = load_model(config, prefer_runs=True)

    assert list_blocks(loaded.model.sam.state_dict()) == [1]
    assert list(adapt_(loaded.model.sam, config.model_layer)) == [0]
    assert list_blocks(loaded.model.sam.state_dict()) == [0, 1]


def test_a_replaced_block_has_a_store_of_its_own(tiny_sam):
    before = hash_encoder(tiny_sam)

    mount_fft_attention_(tiny_sam.sam, [1])

    assert hash_encoder(tiny_sam) != before
