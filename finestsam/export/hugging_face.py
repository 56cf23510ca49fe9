"""A SAM in the layout of Hugging Face's transformers, whose `SamModel` and `SamProcessor` load the folder.

Names as in transformers' own convert_sam_to_hf.py.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from finestsam.errors import UserError
from finestsam.model.architectures import ARCHITECTURES, PATCH_SIZE, PIXEL_MEAN, PIXEL_STD
from finestsam.runtime.whole_files import write_json

WEIGHTS, CONFIG, IMAGES = "model.safetensors", "config.json", "preprocessor_config.json"
# Parts of SAM's names and their replacements in transformers, applied in this order.
RENAMED = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.blocks\.", ".layers."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    # The first and the last of a head's three layers have names of their own.
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.layers\.0\.", r"\1.proj_in."),
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.layers\.2\.", r"\1.proj_out."),
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.layers\.1\.", r"\1.layers.0."),
)
POSITIONS, IMAGE_POSITIONS = (
    "prompt_encoder.shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)


def require_safetensors() -> None:
    """Raise unless the package that writes the weights is installed."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise UserError("export.format huggingface: first run: pip install safetensors") from None


def write_hugging_face(sam: Sam, model_type: str, folder: Path) -> None:
    """Write a SAM's weights, model config and image processor config into a folder."""
    from safetensors import SafetensorError  # optional package
    from safetensors.torch import save_file

    try:
        save_file(rename_weights(sam.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # raised for a full disk
        raise OSError(str(error)) from None
    size = sam.image_encoder.img_size
    write_json(folder / CONFIG, describe_model(model_type, size), indent=2)
    write_json(folder / IMAGES, describe_images(size), indent=2)
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes its files readable for the owner only


def rename_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return SAM's weights by transformers' names; no two tensors share memory."""
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value.detach().to("cpu", torch.float32).contiguous()
    return renamed | {IMAGE_POSITIONS: renamed[POSITIONS].clone()}


def describe_model(model_type: str, image_size: int) -> dict[str, Any]:
    """Return the values of `SamConfig`."""
    architecture = ARCHITECTURES[model_type]
    sizes = {"image_size": image_size, "patch_size": PATCH_SIZE}
    vision = {
        "model_type": "sam_vision_model",
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.heads,
        "mlp_ratio": 4.0,
        "output_channels": architecture.decoder_width,
        "num_pos_feats": architecture.decoder_width // 2,
        "window_size": architecture.window_size,
        "global_attn_indexes": list(architecture.global_blocks),
        "layer_norm_eps": 1e-6,
    }
    prompts = {
        "model_type": "sam_prompt_encoder",
        "hidden_size": architecture.decoder_width,
        "mask_input_channels": architecture.mask_channels,
    }
    decoder = {
        "model_type": "sam_mask_decoder",
        "hidden_size": architecture.decoder_width,
        "mlp_dim": architecture.decoder_mlp_width,
        "layer_norm_eps": 1e-5,  # of the two-way transformer, as in segment_anything; the default differs
    }
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "torch_dtype": "float32",
        "vision_config": vision | sizes,
        "prompt_encoder_config": prompts | sizes,
        "mask_decoder_config": decoder,
    }


def describe_images(image_size: int) -> dict[str, Any]:
    """Return the values of `SamImageProcessor`, which scales images to 0 to 1 before it normalises them."""
    side, mask_side = image_size, image_size // 4
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": side},
        "resample": 2,  # Pillow's bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in PIXEL_MEAN],
        "image_std": [value / 255 for value in PIXEL_STD],
        "do_pad": True,
        "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": mask_side},
        "mask_pad_size": {"height": mask_side, "width": mask_side},
    }
