"""Build a SAM from segment_anything's own modules, in Meta's three sizes and two of ours, or MobileSAM's."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

from finestsam.config import IMAGE_SIZES, PATCH_SIZE
from finestsam.errors import UserError
from finestsam.model.decoder import FoldedMaskDecoder
from finestsam.model.encoder import ChunkedImageEncoder

# ImageNet's channel means and deviations, as in segment_anything's build_sam.py.
PIXEL_MEAN = [123.675, 116.28, 103.53]
PIXEL_STD = [58.395, 57.12, 57.375]


@dataclass(frozen=True)
class Architecture:
    """The sizes in which SAMs differ; widths in channels."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]  # the blocks whose attention sees the whole image, not one window
    window_size: int = 14  # tokens
    decoder_width: int = 256
    decoder_mlp_width: int = 2048
    mask_channels: int = 16
    is_tiny_vit: bool = False  # encoder of tiny_vit.py; width, heads and window_size are those of its last stage


ARCHITECTURES = {
    "vit_b": Architecture(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    "vit_l": Architecture(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": Architecture(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    # MobileSAM's.
    "vit_t": Architecture(width=320, depth=12, heads=10, global_blocks=(), window_size=7, is_tiny_vit=True),
    # For laptops: 5 M weights. Windows of 8 tokens tile its 48 x 48 without padding.
    "vit_tiny": Architecture(
        width=192, depth=8, heads=6, global_blocks=(1, 3, 5, 7), window_size=8, decoder_width=128,
        decoder_mlp_width=1024,
    ),
    # For tests: built in milliseconds.
    "vit_tiny_test": Architecture(
        width=32, depth=2, heads=2, global_blocks=(1,), window_size=2, decoder_width=32,
        decoder_mlp_width=64, mask_channels=4,
    ),
}  # fmt: skip


def build_sam(model_type: str, image_size: int | None = None) -> Sam:
    """Return a SAM with random weights, in evaluation mode.

    Args:
        model_type: a key of `ARCHITECTURES`.
        image_size: pixels of the longest side, a multiple of 16; None: the type's own.

    Raises:
        UserError: vit_t needs timm, which is not installed.
    """
    architecture = ARCHITECTURES[model_type]
    image_size = image_size or IMAGE_SIZES[model_type]
    grid_size = image_size // PATCH_SIZE
    sam = Sam(
        image_encoder=(_build_tiny_vit if architecture.is_tiny_vit else _build_image_encoder)(architecture, image_size),
        prompt_encoder=PromptEncoder(
            embed_dim=architecture.decoder_width,
            image_embedding_size=(grid_size, grid_size),
            input_image_size=(image_size, image_size),
            mask_in_chans=architecture.mask_channels,
        ),
        mask_decoder=_build_mask_decoder(architecture),
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
    )
    if not architecture.is_tiny_vit:
        start_encoder_(sam.image_encoder)
    start_decoder_(sam.mask_decoder)
    return sam.eval()


def _build_image_encoder(architecture: Architecture, image_size: int) -> ChunkedImageEncoder:
    return ChunkedImageEncoder(
        img_size=image_size,
        patch_size=PATCH_SIZE,
        embed_dim=architecture.width,
        depth=architecture.depth,
        num_heads=architecture.heads,
        mlp_ratio=4,
        out_chans=architecture.decoder_width,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=architecture.window_size,
        global_attn_indexes=architecture.global_blocks,
    )


def _build_tiny_vit(architecture: Architecture, image_size: int) -> nn.Module:
    try:
        from finestsam.model.tiny_vit import TinyVitImageEncoder  # timm is optional and takes seconds to import
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "timm":
            raise
        raise UserError(
            f"MobileSAM's image encoder is made of timm's blocks ({error}); to use vit_t, first run: pip install timm"
        ) from None
    return TinyVitImageEncoder(image_size, architecture.decoder_width)


def _build_mask_decoder(architecture: Architecture) -> FoldedMaskDecoder:
    return FoldedMaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(
            depth=2,
            embedding_dim=architecture.decoder_width,
            mlp_dim=architecture.decoder_mlp_width,
            num_heads=8,
        ),
        transformer_dim=architecture.decoder_width,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )


# How sharply an untrained decoder attends to the position of its prompt.
POSITION_GAIN = 2.5
# Weights of red, green and blue for brightness and two colour contrasts, and their standard deviations in images.
COLOUR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
COLOUR_STRENGTHS = (1.0, 0.25, 0.2)
# Amplitudes in images fall with the spatial frequency f about as (1 + f)^-FALL; f counts half waves per patch.
FALL = 1.3


@torch.no_grad()
def start_encoder_(encoder: ImageEncoderViT) -> None:
    """Start each block and the neck as the identity, and the patch embedding as a cosine transform.

    All outputs of the transform have about the same variance.
    """
    nn.init.trunc_normal_(encoder.pos_embed, std=0.02)  # tokens must differ by position
    for block in encoder.blocks:
        for last in (block.attn.proj, block.mlp.lin2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    nn.init.dirac_(encoder.neck[2].weight)
    projection = encoder.patch_embed.proj
    waves = make_waves(projection.kernel_size[0])[: projection.out_channels]
    projection.weight[: len(waves)] = waves
    projection.bias[: len(waves)] = 0


def make_waves(side: int) -> Tensor:
    """Return the discrete cosine transform (DCT-II) of a colour patch, 3 side^2 x 3 x side x side.

    The waves that are strongest in images come first. Each is scaled: its product with patches of images of standard
    deviation 1 has a standard deviation of about 1.
    """
    positions = torch.arange(side, dtype=torch.float64) + 0.5
    numbers = torch.arange(side, dtype=torch.float64)
    cosines = torch.cos(math.pi / side * numbers[:, None] * positions) * math.sqrt(2 / side)
    cosines[0] /= math.sqrt(2)
    axes = torch.tensor(COLOUR_AXES, dtype=torch.float64)
    axes = axes / axes.norm(dim=1, keepdim=True)
    waves = torch.einsum("ck,uy,vx->cuvkyx", axes, cosines, cosines)
    amplitudes = (1 + torch.hypot(numbers[:, None], numbers)) ** -FALL
    amplitudes = side * math.sqrt(3) * torch.tensor(COLOUR_STRENGTHS, dtype=torch.float64)[:, None, None] * amplitudes
    order = amplitudes.flatten().argsort(descending=True, stable=True)
    return (waves / amplitudes[..., None, None, None]).flatten(0, 2)[order].float()


@torch.no_grad()
def start_decoder_(decoder: MaskDecoder) -> None:
    """Start queries and keys with the same projection, so that a prompt attends to its own position from the start.

    Prompts and image tokens carry the same position encoding, but two random projections of it are unrelated. With
    random projections the decoder predicts empty masks for its first 200 steps.
    """
    for attention in decoder.modules():
        if isinstance(attention, Attention):
            attention.k_proj.weight.copy_(attention.q_proj.weight.mul_(POSITION_GAIN))
