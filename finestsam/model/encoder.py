"""segment_anything's image encoder with the same weights, names and outputs, in less memory and time.

Stock attention computes the scores of all heads at once, 800 MB for each global block of vit_b, and goes over them five
times. `attention.py` computes them in chunks, and again for the gradient.

Windows at the edge are padded with zeros. The projection of zeros is known, so only the image's own tokens are
projected.
"""

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, window_partition, window_unpartition
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finestsam.model.attention import attend_with_positions
from finestsam.model.fft_attention import FftAttention

# Tokens in one pass on the CPU, through windows and (without a gradient) through the MLP. Fewer halve the speed of
# bfloat16 products; more do not fit the cache.
CHUNK_TOKENS = 2048


class ChunkedImageEncoder(ImageEncoderViT):
    """SAM's image encoder, computed in chunks.

    Attributes:
        recomputes: keep only the input of each block and compute the block again in the backward pass: less memory,
            more time.
    """

    recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings, B x C x g x g, of normalised and padded images, B x 3 x H x W."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = x.contiguous()
        for block in self.blocks:
            # Blocks before the first trained weight need no gradient; without it they take less memory and time.
            needs_gradient = torch.is_grad_enabled() and (x.requires_grad or _trains(block))
            if needs_gradient and self.recomputes:
                x = checkpoint(_pass_block, block, x, use_reentrant=False)
            else:
                with torch.set_grad_enabled(needs_gradient):
                    x = _pass_block(block, x)
        return self.neck(x.permute(0, 3, 1, 2))


def _trains(block: Block) -> bool:
    return any(weight.requires_grad for weight in block.parameters())


def _pass_block(block: Block, x: Tensor) -> Tensor:
    """Send tokens, B x H x W x C, through a block."""
    return pass_mlp(block, x + attend(block.attn, block.norm1(x), block.window_size))


def pass_mlp(block: Block, x: Tensor) -> Tensor:
    """Send tokens, B x H x W x C, through the MLP of a block; without a gradient they are changed in place."""
    if torch.is_grad_enabled():
        return x + block.mlp(block.norm2(x))
    for chunk in x.view(-1, x.shape[-1]).split(CHUNK_TOKENS):
        chunk += block.mlp(block.norm2(chunk))
    return x


def attend(attention: Attention | FftAttention, x: Tensor, window_size: int) -> Tensor:
    """Let tokens, B x H x W x C, attend to each other in windows of `window_size`; 0: to all."""
    if isinstance(attention, FftAttention):
        return _transform(attention, x, window_size)
    batch, height, width = x.shape[:3]
    window = (window_size, window_size) if window_size else (height, width)
    # On a CPU a few rows of windows at a time stay in the cache; a GPU is fastest with all at once.
    chunk_rows = window[0] * max(1, CHUNK_TOKENS // (batch * window[0] * width))
    rows = height if x.is_cuda else chunk_rows
    seen = [_attend_in_windows(attention, chunk, window) for chunk in x.split(rows, dim=1)]
    return torch.cat(seen, dim=1) if len(seen) > 1 else seen[0]


def _transform(attention: FftAttention, x: Tensor, window_size: int) -> Tensor:
    if window_size == 0:
        return attention(x)
    windows, padded_size = window_partition(x, window_size)
    return window_unpartition(attention(windows), window_size, padded_size, x.shape[1:3])


def _attend_in_windows(attention: Attention, x: Tensor, window: tuple[int, int]) -> Tensor:
    """Let tokens, B x H x W x C, attend to each other in windows of (height, width), padded at the edges."""
    batch, height, width, channels = x.shape
    projected = attention.qkv(x)
    padding = (-height % window[0], -width % window[1])
    if any(padding):
        filled = attention.qkv(x.new_zeros(channels)).expand(batch, height + padding[0], width + padding[1], -1).clone()
        filled[:, :height, :width] = projected
        projected = filled
    rows, columns = projected.shape[1] // window[0], projected.shape[2] // window[1]
    heads, length = attention.num_heads, window[0] * window[1]
    parts = projected.view(batch, rows, window[0], columns, window[1], 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = parts.reshape(3, batch * rows * columns * heads, length, -1)
    with torch.autocast(x.device.type, enabled=False):  # autocast would compute a bfloat16 softmax in float32
        seen = _attend_with_positions(attention, q, k, v, window)
    seen = seen.view(batch, rows, columns, heads, *window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    seen = seen.reshape(batch, rows * window[0], columns * window[1], -1)[:, :height, :width]
    return attention.proj(seen)


def _attend_with_positions(attention: Attention, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
    """Attend with relative positions.

    Args:
        q, k, v: N x L x d, N images or windows times heads, L tokens of (height, width) `size`.
    """
    q = q.unflatten(1, size)  # N x h x w x d
    if attention.use_rel_pos:
        by_row, by_column = _compare_rows(q, attention.rel_pos_h), _compare_columns(q, attention.rel_pos_w)
    else:
        by_row, by_column = (q.new_zeros(*q.shape[:3], side) for side in size)
    return attend_with_positions(q * attention.scale, k, v, by_row, by_column)


def _compare_rows(q: Tensor, table: Tensor) -> Tensor:
    """Return what the rows of query and key add to their score, N x h x w x h.

    Args:
        q: N x h x w x d.
        table: 2 h - 1 x d, by the row of the query minus that of the key, from 1 - h on.
    """
    count, height, width, _ = q.shape
    products = q @ table.flip(0).T.to(q.dtype)  # N x h x w x 2 h - 1, by the row of the key minus that of the query
    length = 2 * height - 1
    # Query row y needs h products from h - 1 - y on, for key rows 0 to h - 1: a view that starts one earlier each row.
    strides = (height * width * length, width * length - 1, length, 1)
    return products.as_strided((count, height, width, height), strides, height - 1)


def _compare_columns(q: Tensor, table: Tensor) -> Tensor:
    """Return what the columns of query and key add to their score, N x h x w x w."""
    count, height, width, _ = q.shape
    products = q @ table.flip(0).T.to(q.dtype)
    length = 2 * width - 1
    strides = (height * width * length, width * length, length - 1, 1)
    return products.as_strided((count, height, width, width), strides, width - 1)
