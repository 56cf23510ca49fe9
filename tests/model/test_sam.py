import pytest
import torch
from segment_anything.modeling import Sam

from finestsam.batch import Prompts
from finestsam.config import IMAGE_SIZES
from finestsam.model.architectures import build_sam
from finestsam.model.resample import upscale_logits
from finestsam.model.sam import FinestSam

ORIGINAL_SIZE, INPUT_SIZE = (90, 120), (48, 64)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randint(0, 255, (3, *INPUT_SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_prompts(kinds: set[str], count: int = 3) -> Prompts:
    draw = torch.Generator().manual_seed(1)
    prompts = Prompts()
    if "points" in kinds:
        prompts.points = torch.rand(count, 2, 2, generator=draw) * 48
        prompts.labels = torch.tensor([[1, 0], [1, 1], [1, -1]])
    if "boxes" in kinds:
        corners = torch.rand(count, 2, 2, generator=draw) * 20
        prompts.boxes = torch.cat([corners[:, 0], corners[:, 0] + corners[:, 1] + 1], dim=1)
    if "masks" in kinds:
        prompts.mask_logits = torch.randn(count, 1, 16, 16, generator=draw) * 5
    return prompts


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize(
    "kinds", [{"points"}, {"boxes"}, {"points", "boxes"}, {"points", "masks"}, {"points", "boxes", "masks"}, {"masks"}]
)
def test_the_forward_pass_is_segment_anythings(tiny_sam, image, kinds, multimask_output):
    prompts = make_prompts(kinds)
    tiny_sam.multimask_output = multimask_output
    record = {"image": image.float(), "original_size": ORIGINAL_SIZE}
    if "points" in kinds:
        record |= {"point_coords": prompts.points, "point_labels": prompts.labels}
    if "boxes" in kinds:
        record["boxes"] = prompts.boxes
    if "masks" in kinds:
        record["mask_inputs"] = prompts.mask_logits
    (expected,) = tiny_sam.sam([record], multimask_output)

    predictions = tiny_sam(tiny_sam.encode([image]), prompts)
    masks = upscale_logits(predictions.logits, 64, INPUT_SIZE, ORIGINAL_SIZE) > 0

    torch.testing.assert_close(predictions.logits, expected["low_res_logits"])
    torch.testing.assert_close(predictions.scores, expected["iou_predictions"])
    assert torch.equal(masks, expected["masks"])


def test_objects_without_a_mask_prompt_are_predicted_as_if_none_had_one(tiny_sam, image):
    embedding = tiny_sam.encode([image])
    with_masks, without = make_prompts({"points", "masks"}), make_prompts({"points"})
    with_masks.has_mask = torch.tensor([True, False, False])

    mixed = tiny_sam(embedding, with_masks).logits

    torch.testing.assert_close(mixed[1:], tiny_sam(embedding, without).logits[1:])
    with_masks.has_mask = None
    torch.testing.assert_close(mixed[:1], tiny_sam(embedding, with_masks).logits[:1])


def test_objects_can_be_decoded_in_chunks(tiny_sam, image):
    embedding, prompts = tiny_sam.encode([image]), make_prompts({"points", "boxes"})

    whole = tiny_sam(embedding, prompts)
    parts = [tiny_sam(embedding, prompts[start : start + 1]) for start in range(3)]

    torch.testing.assert_close(torch.cat([part.logits for part in parts]), whole.logits)


def test_gradients_reach_every_part(tiny_sam, image):
    predictions = tiny_sam(tiny_sam.encode([image]), make_prompts({"points"}))
    (predictions.logits.sum() + predictions.scores.sum()).backward()

    for part in (tiny_sam.sam.image_encoder, tiny_sam.sam.prompt_encoder, tiny_sam.sam.mask_decoder):
        assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in part.parameters())


def test_half_precision_is_for_the_encoder_alone(image):
    torch.manual_seed(0)
    sam = build_sam("vit_tiny_test")
    exact, rounded = FinestSam(sam), FinestSam(sam, encoder_dtype=torch.bfloat16)
    prompts = Prompts(boxes=torch.tensor([[10.1234, 5.4321, 40.9876, 33.3333]]))

    embeddings = exact.encode([image]), rounded.encode([image])

    assert embeddings[1].dtype == torch.float32
    assert 0 < (embeddings[0] - embeddings[1]).abs().max() < 0.2
    torch.testing.assert_close(exact._embed_prompts(prompts)[0], rounded._embed_prompts(prompts)[0], rtol=0, atol=0)


def test_upscaling_is_segment_anythings(tiny_sam):
    logits = torch.randn(2, 3, 16, 16)

    for original in [(90, 120), (300, 400), (48, 64)]:
        expected = tiny_sam.sam.postprocess_masks(logits, INPUT_SIZE, original)
        torch.testing.assert_close(upscale_logits(logits, 64, INPUT_SIZE, original), expected)


@pytest.mark.parametrize("model_type", ["vit_tiny", "vit_tiny_test"])
def test_our_sizes_are_plain_sams_at_any_multiple_of_16(model_type):
    for image_size in (None, 128):
        sam = build_sam(model_type, image_size)
        assert isinstance(sam, Sam)
        assert sam.image_encoder.img_size == (image_size or IMAGE_SIZES[model_type])


def test_vit_tiny_has_a_few_million_weights():
    assert 3e6 < sum(weight.numel() for weight in build_sam("vit_tiny").parameters()) < 7e6


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["vit_b", "vit_l", "vit_h"])
def test_metas_sizes_have_the_weights_of_segment_anythings_registry(model_type):
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        expected = {name: value.shape for name, value in sam_model_registry[model_type]().state_dict().items()}
        found = {name: value.shape for name, value in build_sam(model_type).state_dict().items()}

    assert found == expected
