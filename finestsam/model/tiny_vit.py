"""MobileSAM's image encoder: a TinyViT of timm's blocks, under MobileSAM's names, so that its files load both ways.

Zhang et al., Faster Segment Anything (arXiv 2306.14289); Wu et al., TinyViT (arXiv 2207.10666). TinyViT's last stage
halves the grid; this one keeps it, because SAM's decoder needs one token for 16 x 16 pixels.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import ConvNorm, MBConv, PatchEmbed, PatchMerging, TinyVitBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class _Shape:
    """The sizes of a stage."""

    width: int  # channels
    depth: int
    heads: int = 0  # 0: convolutions instead of attention
    window_size: int = 0  # tokens


# TinyViT-5M.
STAGES = (_Shape(64, 2), _Shape(128, 2, 4, 7), _Shape(160, 6, 5, 14), _Shape(320, 2, 10, 7))
MBCONV_EXPANSION = 4.0
# Of the classifier that TinyViT was trained with before MobileSAM; its weights are in MobileSAM's files.
IMAGENET_CLASSES = 1000


class TinyVitImageEncoder(nn.Module):
    """The encoder.

    Batch norms keep their loaded statistics in training as well, because a step has too few images to estimate them.

    Args:
        image_size: pixels of the side of the padded square, a multiple of 16. No weight depends on it.
        width: channels of the embedding.

    Attributes:
        recomputes: keep only the input of each block and compute the block again in the backward pass: less memory,
            more time.
    """

    recomputes = False

    def __init__(self, image_size: int, width: int):
        super().__init__()
        self.img_size = image_size
        embed = PatchEmbed(3, STAGES[0].width, nn.GELU)
        self.patch_embed = nn.Sequential(OrderedDict(seq=nn.Sequential(embed.conv1, embed.act, embed.conv2)))
        followers = (*STAGES[1:], None)
        self.layers = nn.ModuleList(_Stage(shape, after) for shape, after in zip(STAGES, followers, strict=True))
        self.layers[-2].downsample.conv2.conv.stride = (1, 1)
        last = STAGES[-1].width
        self.norm_head = _keep(nn.LayerNorm(last))
        self.head = _keep(nn.Linear(last, IMAGENET_CLASSES))
        self.neck = nn.Sequential(
            nn.Conv2d(last, width, 1, bias=False), LayerNorm2d(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width),
        )  # fmt: skip
        _rename_convolutions_(self)
        self.train(self.training)

    @property
    def blocks(self) -> nn.ModuleList:
        """All stages' blocks, in the order in which an image goes through them."""
        return nn.ModuleList(block for stage in self.layers for block in stage.blocks)

    def train(self, mode: bool = True) -> "TinyVitImageEncoder":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings, B x C x g x g, of normalised and padded images, B x 3 x H x W."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x, self.recomputes)
        return self.neck(x)


class _Stage(nn.Module):
    """Blocks on one grid, and the downsampling to the next grid."""

    def __init__(self, shape: _Shape, after: _Shape | None):
        super().__init__()
        self.has_attention = shape.heads > 0
        self.blocks = nn.ModuleList(_build_block(shape) for _ in range(shape.depth))
        self.downsample = PatchMerging(shape.width, after.width, nn.GELU) if after else nn.Identity()

    def forward(self, x: Tensor, recomputes: bool) -> Tensor:
        """Send B x C x H x W through."""
        if self.has_attention:
            x = x.permute(0, 2, 3, 1)  # B x H x W x C
        recomputes = recomputes and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recomputes else block(x)
        if self.has_attention:
            x = x.permute(0, 3, 1, 2)
        return self.downsample(x)


def _build_block(shape: _Shape) -> nn.Module:
    if shape.heads == 0:
        return MBConv(shape.width, shape.width, MBCONV_EXPANSION, nn.GELU, drop_path=0.0)
    return TinyVitBlock(shape.width, shape.heads, shape.window_size)


def _keep(layer: nn.Module) -> nn.Module:
    """Return a module that keeps a layer's weights as buffers, names unchanged; nothing uses or trains them."""
    carrier = nn.Module()
    for name, weight in layer.named_parameters():
        carrier.register_buffer(name, weight.detach())
    return carrier


def _rename_convolutions_(root: nn.Module) -> None:
    for name, module in root.named_children():
        if isinstance(module, ConvNorm):
            setattr(root, name, nn.Sequential(OrderedDict(c=module.conv, bn=module.bn)))
        else:
            _rename_convolutions_(module)
