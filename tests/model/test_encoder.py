"""The chunked encoder against segment_anything's own."""

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from finestsam.model import attention
from finestsam.model import encoder as encoder_module
from finestsam.model.architectures import build_sam
from finestsam.model.encoder import ChunkedImageEncoder


@pytest.fixture
def encoder():
    """Windows of 2 x 2 tokens that do not tile its 5 x 5; blocks and relative positions that count.

    To learn from, each block would begin as one that adds nothing.
    """
    torch.manual_seed(0)
    encoder = build_sam("vit_tiny_test", image_size=80).image_encoder
    for name, weight in encoder.named_parameters():
        if not weight.count_nonzero() or weight.ndim == 1 or "rel_pos" in name:
            nn.init.normal_(weight, std=0.5)
    return encoder


def encode_like_meta(encoder, images):
    return ImageEncoderViT.forward(encoder, images)


def compute_gradients(encoder, images, forward):
    encoder.zero_grad()
    forward(images).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in encoder.named_parameters()}


@pytest.mark.parametrize("scores", [1, 30, 300, 10**6])
def test_embeddings_are_those_of_segment_anything(encoder, monkeypatch, scores):
    monkeypatch.setattr(attention, "CHUNK_BYTES", 4 * scores)
    monkeypatch.setattr(encoder_module, "CHUNK_TOKENS", 7)
    images = torch.randn(2, 3, 80, 80)

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        encoder.to(dtype)
        with torch.no_grad():
            expected, found = encode_like_meta(encoder, images.to(dtype)), encoder(images.to(dtype))
        assert type(encoder) is ChunkedImageEncoder
        assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("scores", [1, 40, 300, 10**6])
@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients_are_those_of_segment_anything(encoder, monkeypatch, recomputes, scores):
    monkeypatch.setattr(attention, "CHUNK_BYTES", 4 * scores)
    monkeypatch.setattr(encoder_module, "CHUNK_TOKENS", 7)
    encoder.double().recomputes = recomputes
    images = torch.randn(2, 3, 80, 80, dtype=torch.float64)

    expected = compute_gradients(encoder, images, lambda some: encode_like_meta(encoder, some))
    found = compute_gradients(encoder, images, encoder)

    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_embeddings_depend_on_attention(encoder):
    images = torch.randn(1, 3, 80, 80)
    with torch.no_grad():
        before = encoder(images)
        for block in encoder.blocks:
            block.attn.rel_pos_h.neg_()
        after = encoder(images)

    assert (after - before).norm() > 0.01 * before.norm()


def count_kept_for_the_gradient(encoder):
    seen = {}

    def note(tensor):
        seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoder(torch.randn(1, 3, 80, 80))
    return sum(seen.values()) - sum(weight.numel() for weight in encoder.parameters())


def test_recomputing_keeps_less_for_the_gradient(encoder):
    kept = []
    for encoder.recomputes in (False, True):
        kept.append(count_kept_for_the_gradient(encoder))

    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(("dtype", "kept_scores"), [(torch.float32, 10**6), (torch.bfloat16, 319_999)])
def test_many_scores_are_not_kept_for_the_gradient(monkeypatch, dtype, kept_scores):
    monkeypatch.setattr(attention, "KEPT_SCORES", kept_scores)
    inputs = make_attention(20, dtype)
    kept = []

    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda one: one
    ):
        seen = attention.attend_with_positions(*inputs)

    assert sum(kept) == sum(each.numel() for each in (*inputs, seen)) < 400 * 400


def make_attention(side, dtype):
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, side**2, 8, generator=draw)
    by_row, by_column = torch.randn(2, 2, side, side, side, generator=draw)
    return [each.to(dtype).requires_grad_() for each in (q.unflatten(1, (side, side)), k, v, by_row, by_column)]


@pytest.mark.parametrize("kept_scores", [0, 10**6])
@pytest.mark.parametrize("chunk_scores", [100, 3000, 10**6])
def test_gradients_in_half_precision_are_as_close_as_autograds(monkeypatch, kept_scores, chunk_scores):
    monkeypatch.setattr(attention, "CHUNK_BYTES", 2 * chunk_scores)
    monkeypatch.setattr(attention, "KEPT_SCORES", kept_scores)

    def find_gradients(attend, dtype):
        inputs = make_attention(6, dtype)
        attend(*inputs).square().sum().backward()
        return [each.grad.double() for each in inputs]

    def attend_plainly(q, k, v, by_row, by_column):
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(3).flatten(1, 2)
        return (bias + q.flatten(1, 2) @ k.transpose(1, 2)).softmax(dim=-1) @ v

    exact = find_gradients(attend_plainly, torch.float64)
    ours, plain = (
        find_gradients(attend, torch.bfloat16) for attend in (attention.attend_with_positions, attend_plainly)
    )

    for expected, found, theirs in zip(exact, ours, plain, strict=True):
        assert (found - expected).norm() < 1.5 * (theirs - expected).norm()


@pytest.mark.parametrize("attend", [attention.attend_folded, attention.attend_masked])
def test_each_way_to_attend_gives_the_same(monkeypatch, attend):
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 4, 12, 5, generator=draw)
    q = q.unflatten(1, (3, 4))
    by_row, by_column = torch.randn(4, 3, 4, 3, generator=draw), torch.randn(4, 3, 4, 4, generator=draw)

    expected = attention.attend_in_pieces(q, k, v, by_row, by_column)

    for scores in (1, 300, 10**6):
        monkeypatch.setattr(attention, "CHUNK_BYTES", 4 * scores)
        torch.testing.assert_close(attend(q, k, v, by_row, by_column), expected)


@pytest.mark.parametrize("has_matrix_units", [False, True])
def test_half_precision_is_as_close_as_segment_anythings(encoder, monkeypatch, has_matrix_units):
    monkeypatch.setattr(attention, "has_feature", lambda name: has_matrix_units)
    images = torch.randn(1, 3, 80, 80)
    with torch.no_grad():
        exact = encode_like_meta(encoder, images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, theirs = encoder(images), encode_like_meta(encoder, images)

    assert (found - exact).norm() < 1.5 * (theirs - exact).norm()
