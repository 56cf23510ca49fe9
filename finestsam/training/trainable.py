"""Decide which weights train."""

from segment_anything.modeling import Sam

from finestsam.config import Config
from finestsam.model.lora import list_lora
from finestsam.model.sam import FinestSam


def freeze_(model: FinestSam, config: Config, decodes_masks: bool = True) -> None:
    """Turn gradients off, in place, for the parts that the settings freeze and for weights that no prompt can reach.

    A weight out of reach would get a gradient of zero, and AdamW's decay would still wear it down.

    Args:
        decodes_masks: whether a step prompts the mask decoder.
    """
    sam, freeze = model.sam, config.model_layer.freeze
    sam.image_encoder.requires_grad_(not freeze.image_encoder)
    sam.prompt_encoder.requires_grad_(not freeze.prompt_encoder)
    sam.mask_decoder.requires_grad_(not freeze.mask_decoder)
    if blocks := config.model_layer.thaw.blocks:
        sam.image_encoder.blocks[-blocks:].requires_grad_(True)
        sam.image_encoder.neck.requires_grad_(True)
    for _, layer in list_lora(sam):
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    _freeze_unused_mask_tokens_(sam, config.multimask_output)
    _freeze_unused_prompts_(sam, config)
    if not decodes_masks:
        sam.prompt_encoder.requires_grad_(False)
        sam.mask_decoder.requires_grad_(False)


def _freeze_unused_mask_tokens_(sam: Sam, multimask_output: bool) -> None:
    networks = sam.mask_decoder.output_hypernetworks_mlps
    for network in networks[:1] if multimask_output else networks[1:]:
        network.requires_grad_(False)


def _freeze_unused_prompts_(sam: Sam, config: Config) -> None:
    prompts, encoder = config.prompts, sam.prompt_encoder
    points, boxes = prompts.use_points, prompts.use_boxes
    clicks = prompts.correction_clicks > 0  # positive and negative, with the logits of the last mask
    masks = prompts.use_masks or prompts.use_logits or clicks
    # point_embeddings: outside, inside, upper left corner, lower right corner.
    is_used = [
        points and config.dataset.negative_points > 0 or clicks,
        points and config.dataset.positive_points > 0 or clicks,
        boxes,
        boxes,
    ]
    for embedding, used in zip(encoder.point_embeddings, is_used, strict=True):
        if not used:
            embedding.requires_grad_(False)
    if not points and not clicks:
        encoder.not_a_point_embed.requires_grad_(False)
    if not masks:
        encoder.mask_downscaling.requires_grad_(False)
    if prompts.use_masks and not prompts.mix:  # every object has a mask prompt
        encoder.no_mask_embed.requires_grad_(False)


def trains_encoder(model: FinestSam) -> bool:
    """Whether any weight of the image encoder trains, so that embeddings change."""
    return any(weight.requires_grad for weight in model.sam.image_encoder.parameters())
