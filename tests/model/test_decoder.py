"""The folded decoder against segment_anything's own, which it inherits as `forward`."""

import pytest
import torch
from torch import nn

from finestsam.batch import Prompts
from finestsam.model import decoder as decoder_module
from finestsam.model.architectures import build_sam
from finestsam.model.sam import FinestSam

COUNT = 5


@pytest.fixture
def sam():
    """A small model whose biases and norms count: from scratch they are 0 and 1, and mistakes with them unseen."""
    torch.manual_seed(0)
    sam = build_sam("vit_tiny_test")
    for weight in sam.mask_decoder.parameters():
        if weight.ndim == 1:
            nn.init.normal_(weight, std=0.5)
    return sam


def make_prompts(kinds):
    draw = torch.Generator().manual_seed(1)
    prompts = Prompts()
    if "points" in kinds:
        prompts.points = torch.rand(COUNT, 2, 2, generator=draw) * 48
        prompts.labels = torch.ones(COUNT, 2)
    if "boxes" in kinds:
        prompts.boxes = torch.rand(COUNT, 4, generator=draw) * 48
    if "masks" in kinds:
        prompts.mask_logits = torch.randn(COUNT, 1, 16, 16, generator=draw)
    return prompts


def output(sam, embedding, prompts, multimask_output, is_folded):
    """Answer in the type of the embedding."""
    model = FinestSam(sam, multimask_output)
    decoder = sam.mask_decoder.to(embedding.dtype)
    sparse, dense = (some.to(embedding.dtype) for some in model._embed_prompts(prompts))
    positions = sam.prompt_encoder.get_dense_pe().to(embedding.dtype)
    if is_folded:
        return decoder.predict(decoder.compute_image_features(embedding, positions, dense), sparse, model._mask_slice)[
            :2
        ]
    dense = dense.expand(COUNT, *embedding.shape[1:])
    return decoder(embedding, positions, sparse, dense, multimask_output)


def compute_gradients(sam, embedding, is_folded):
    sam.zero_grad()
    leaf = embedding.clone().requires_grad_()
    logits, scores = output(sam, leaf, make_prompts({"points"}), True, is_folded)
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    ((logits * factors).sum() + (scores * factors[..., 0, 0]).sum()).backward()
    weights = sam.mask_decoder.named_parameters()
    return {name: weight.grad for name, weight in weights if weight.grad is not None} | {"embedding": leaf.grad}


def measure_error(found, exact):
    """Return the relative error of all gradients together."""
    off = sum((found[name].double() - exact[name]).square().sum() for name in found)
    return float((off / sum(values.square().sum() for values in exact.values())).sqrt())


@pytest.mark.parametrize("chunk", [1, 2, COUNT])
@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("kinds", [["points"], ["boxes"], ["points", "boxes", "masks"], ["masks"]], ids=" ".join)
def test_outputs_are_those_of_segment_anything(sam, monkeypatch, kinds, multimask_output, chunk):
    embedding, prompts = torch.randn(1, 32, 4, 4), make_prompts(kinds)

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        # With a gradient half of it is used.
        monkeypatch.setattr(decoder_module, "CHUNK_BYTES", 2 * chunk * embedding.to(dtype).nbytes)
        expected = output(sam, embedding.to(dtype), prompts, multimask_output, is_folded=False)
        found = output(sam, embedding.to(dtype), prompts, multimask_output, is_folded=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.detach().abs().max()))


def test_gradients_are_those_of_segment_anything(sam):
    embedding = torch.randn(1, 32, 4, 4)

    exact = compute_gradients(sam, embedding.double(), is_folded=False)
    found = compute_gradients(sam, embedding.double(), is_folded=True)
    rounded = compute_gradients(sam, embedding, is_folded=True)

    assert measure_error(found, exact) < 1e-14
    assert measure_error(rounded, exact) < 1e-6


def test_what_has_no_gradient_is_what_does_not_count(sam):
    """A bias of keys shifts all weights of a softmax alike, and the fourth mask is not requested."""
    embedding = torch.randn(1, 32, 4, 4).double()
    exact = compute_gradients(sam, embedding, is_folded=False)

    left_out = exact.keys() - compute_gradients(sam, embedding, is_folded=True).keys()

    assert left_out
    for name in left_out:
        assert name.endswith("token_to_image.k_proj.bias") or "mlps.0." in name
        assert exact[name].abs().max() < 1e-15


def test_only_masks_that_are_worth_it_are_made(sam):
    model = FinestSam(sam)
    prompts, view = make_prompts({"points"}), model.compute_image_features(torch.randn(1, 32, 4, 4))
    sparse, _ = model._embed_prompts(prompts)
    logits, scores, _ = sam.mask_decoder.predict(view, sparse, slice(1, None))

    for share in (-1, 0, 0.4, 0.9, 1):
        threshold = float("-inf") if share < 0 else float(scores.detach().flatten().quantile(share))
        outputs = model.predict_above(view, prompts, threshold)
        assert torch.equal(outputs.scores, scores)
        assert torch.equal(outputs.is_kept, scores > threshold)
        torch.testing.assert_close(outputs.logits, logits[scores > threshold])


def test_the_weights_keep_their_names(sam):
    from segment_anything.modeling import MaskDecoder, TwoWayTransformer

    transformer = TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=8)
    stock = MaskDecoder(transformer_dim=32, transformer=transformer, iou_head_hidden_dim=256)

    assert stock.load_state_dict(sam.mask_decoder.state_dict())


def test_an_image_seen_in_half_precision_gives_nearly_the_same(sam):
    exact, rounded = FinestSam(sam), FinestSam(sam, encoder_dtype=torch.bfloat16)
    embedding, prompts = torch.randn(1, 32, 4, 4), make_prompts({"points"})

    with torch.no_grad():
        one, other = (
            model.predict_above(model.compute_image_features(embedding), prompts, -torch.inf)
            for model in (exact, rounded)
        )

    assert other.logits.dtype == other.scores.dtype == torch.float32
    assert 0 < (other.logits - one.logits).norm() < 2e-2 * one.logits.norm()
    assert (other.scores - one.scores).norm() < 2e-2 * one.scores.norm()
