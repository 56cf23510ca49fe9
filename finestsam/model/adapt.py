"""The one place where a loaded SAM gets what the settings put into it, in one fixed order."""

from segment_anything.modeling import ImageEncoderViT, Sam
from torch import nn

from finestsam.config import ModelLayerConfig
from finestsam.errors import UserError
from finestsam.model.fft_attention import choose_blocks, mount_fft_attention_
from finestsam.model.lora import mount_lora_


def adapt_(sam: Sam, layers: ModelLayerConfig) -> dict[int, nn.Module]:
    """Mount what training adds to the weights that were loaded; which of them train is decided afterwards.

    Returns:
        The attention that was replaced, by block, which what stands in for it can learn from.

    Raises:
        UserError: the settings name blocks that this SAM does not have.
    """
    depth = len(sam.image_encoder.blocks)
    for name, last in (
        ("model_layer.thaw.blocks", layers.thaw.blocks - 1),
        ("model_layer.lora.blocks", max(layers.lora.blocks, default=0)),
    ):
        if last >= depth:
            raise UserError(f"{name}: this image encoder has {depth} blocks, 0 to {depth - 1}")
    if layers.fft_attention.blocks != "none" and not isinstance(sam.image_encoder, ImageEncoderViT):
        raise UserError(
            "model_layer.fft_attention: MobileSAM's image encoder has no attention of SAM's to replace; it looks at "
            "windows of 7 and 14 tokens, so that its cost already grows no faster than the image"
        )
    replaced = mount_fft_attention_(sam, choose_blocks(sam.image_encoder, layers.fft_attention.blocks))
    mount_lora_(sam, layers.lora, whole_blocks=layers.thaw.blocks)
    return replaced
