"""Weights to learn from where there is no checkpoint. Any checkpoint overwrites them all.

segment_anything starts as PyTorch's layers do, which is of no matter to Meta's weights. From scratch its encoder then
learns nothing for hundreds of steps, and soon gives nearly the same embedding for every image. Three things are in the
way: eight random blocks and a random 3 x 3 convolution mix each token with its neighbours before any of it is
understood, the brightness of a patch drowns what is in it, and queries and keys that should meet at a position encode
it differently.
"""

import math

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

# How sharply the decoder attends to the place of its prompt.
POSITION_GAIN = 2.5
# Red, green and blue: brightness and two contrasts, and how strong images have them, in deviations.
COLOUR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
COLOUR_STRENGTHS = (1.0, 0.25, 0.2)
# The amplitudes of images fall with the spatial frequency f about as (1 + f)^-FALL, f in half waves of a patch.
FALL = 1.3


@torch.no_grad()
def start_encoder_(encoder: ImageEncoderViT) -> None:
    """Let every block and the neck pass on what they get, and begin with the spectrum of patches, all of it as loud."""
    nn.init.trunc_normal_(encoder.pos_embed, std=0.02)  # tokens must differ by place
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
    """Return the discrete cosine transform (DCT-II) of a colour patch, 3 side^2 x 3 x side x side, the loudest first.

    Each is scaled so that its product with patches of images of deviation 1 has a deviation of about 1.
    """
    positions = torch.arange(side, dtype=torch.float64) + 0.5
    numbers = torch.arange(side, dtype=torch.float64)
    cosines = torch.cos(math.pi / side * numbers[:, None] * positions) * math.sqrt(2 / side)
    cosines[0] /= math.sqrt(2)
    axes = torch.tensor(COLOUR_AXES, dtype=torch.float64)
    axes = axes / axes.norm(dim=1, keepdim=True)
    waves = torch.einsum("ck,uy,vx->cuvkyx", axes, cosines, cosines)
    loudness = (1 + torch.hypot(numbers[:, None], numbers)) ** -FALL
    loudness = side * math.sqrt(3) * torch.tensor(COLOUR_STRENGTHS, dtype=torch.float64)[:, None, None] * loudness
    order = loudness.flatten().argsort(descending=True, stable=True)
    return (waves / loudness[..., None, None, None]).flatten(0, 2)[order].float()


@torch.no_grad()
def start_decoder_(decoder: MaskDecoder) -> None:
    """Let queries and keys begin with the same projection, so that a prompt attends to its own place from the start.

    Prompts and image carry the same positional encoding, but two random projections of it have nothing in common; a
    decoder that starts so predicts empty masks for its first 200 steps, until it has found that out.
    """
    for attention in decoder.modules():
        if isinstance(attention, Attention):
            attention.k_proj.weight.copy_(attention.q_proj.weight.mul_(POSITION_GAIN))
