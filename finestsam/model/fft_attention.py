"""Attention by the offset between tokens, through the Fourier transform: N log N steps for N tokens instead of N^2.

SAM's attention gives every pair of tokens its own weight. Here each channel has one weight for each offset on the grid,
shared by all pairs at that offset. It comes from the correlation of queries and keys over the whole grid,

    c[d] = mean over m of q[m + d] k[m] = irfft2(rfft2(q) conj(rfft2(k))) / N    (Wiener and Khinchin)
    a = softmax(gain c + what the relative positions add)
    y[n] = sum over m of a[n - m] v[m] = irfft2(rfft2(a) rfft2(v))

as in Autoformer's auto-correlation (Wu et al., arXiv 2106.13008), in two dimensions and with all offsets. FFTformer
multiplies c with v position by position (Kong et al., arXiv 2211.12250), which is not equivariant to shifts; this is.

The grid wraps around and is not padded with zeros. So every token attends to all others with weights that add up to
one, and the output is exactly equivariant to circular shifts; padding would make the transform four times as large. The
price is that opposite edges are neighbours.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

# A weight that SAM's attention does not have. In a state dict it marks the replaced blocks, and segment_anything
# refuses the file because of it.
MARKER = "fft_gain"


class FftAttention(nn.Module):
    """Replaces an attention of segment_anything's image encoder; starts from copies of its weights, names unchanged.

    Args:
        attention: not changed; no weight is shared.

    Attributes:
        fft_gain: C, the factor of each channel's correlation. At the start the mean over a head's channels equals the
            mean of SAM's scores, which are sums over channels.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv, self.proj = copy.deepcopy(attention.qkv), copy.deepcopy(attention.proj)
        self.use_rel_pos = attention.use_rel_pos
        if self.use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = copy.deepcopy(attention.rel_pos_h), copy.deepcopy(attention.rel_pos_w)
        weight = self.proj.weight
        gain = weight.shape[0] / self.num_heads * attention.scale
        self.fft_gain = nn.Parameter(torch.full_like(weight[0], gain))

    def forward(self, x: Tensor) -> Tensor:
        """Let tokens, B x H x W x C, attend to each other."""
        projected = self.qkv(x)
        with torch.autocast(x.device.type, enabled=False):  # half precision has no FFT for all sizes
            precise = projected if projected.dtype == torch.float64 else projected.float()
            seen = self._mix(precise.permute(0, 3, 1, 2))
        return self.proj(seen.permute(0, 2, 3, 1).to(projected.dtype))

    def _mix(self, projected: Tensor) -> Tensor:
        """Return the attended values, B x C x H x W, from queries, keys and values, B x 3C x H x W."""
        size = projected.shape[2:]
        q, k, v = torch.fft.rfft2(projected).chunk(3, dim=1)
        gain = self.fft_gain.to(projected.dtype)[:, None, None] / size.numel()
        scores = torch.fft.irfft2(q * k.conj(), s=size) * gain
        if self.use_rel_pos:
            channels = scores.shape[1] // self.num_heads
            mean_query = projected[:, : scores.shape[1]].mean(dim=(2, 3)).unflatten(1, (self.num_heads, channels))
            scores = scores + self._score_positions(mean_query, size).repeat_interleave(channels, dim=1)
        weights = scores.flatten(2).softmax(dim=-1).view_as(scores)
        return torch.fft.irfft2(torch.fft.rfft2(weights) * v, s=size)

    def _score_positions(self, mean_query: Tensor, size: tuple[int, int]) -> Tensor:
        """Return what rows and columns add to an offset's score, B x heads x H x W; mean_query is B x heads x d."""
        by_row = mean_query @ _wrap(self.rel_pos_h.to(mean_query.dtype), size[0]).T
        by_column = mean_query @ _wrap(self.rel_pos_w.to(mean_query.dtype), size[1]).T
        return by_row[..., :, None] + by_column[..., None, :]


def _wrap(table: Tensor, length: int) -> Tensor:
    """Return the relative positions of a circle, length x d, from those of a line, 2 length - 1 x d.

    On a circle, d steps forward are also length - d steps back. On the line, length - d pairs are d steps forward and
    d pairs are length - d steps back: the result is the mean over these pairs.
    """
    steps = torch.arange(length, device=table.device)
    share_back = (steps.to(table.dtype) / length)[:, None]
    return torch.lerp(table[length - 1 :], table[(steps - 1).clamp(min=0)], share_back)


def choose_blocks(encoder: ImageEncoderViT, which: Literal["none", "global", "windowed", "all"]) -> list[int]:
    """Return the numbers of the blocks that a setting selects."""
    wanted = {"none": (), "global": (True,), "windowed": (False,), "all": (True, False)}[which]
    return [number for number, block in enumerate(encoder.blocks) if wanted and (block.window_size == 0) in wanted]


def list_blocks(state_dict: Mapping[str, Tensor]) -> list[int]:
    """Return the numbers of the blocks whose attention is replaced in these weights of a SAM."""
    marked = [name.split(".") for name in state_dict if name.endswith(f".attn.{MARKER}")]
    return sorted(int(parts[parts.index("blocks") + 1]) for parts in marked)


def mount_fft_attention_(sam: Sam, blocks: Iterable[int]) -> dict[int, Attention]:
    """Replace the attention of blocks, in place, where it is not replaced yet; return what was replaced, by block."""
    replaced = {}
    for number in blocks:
        block = sam.image_encoder.blocks[number]
        if not isinstance(block.attn, FftAttention):
            replaced[number] = block.attn
            block.attn = FftAttention(block.attn)
    return replaced
