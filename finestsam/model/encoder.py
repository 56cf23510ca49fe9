"""segment_anything's image encoder with the same weights, names and answers, in less memory and time.

Stock attention makes all heads' scores at once, 800 MB for each global block of vit_b, and goes over them five times.
Here they are made, biased, normalised and used a piece at a time while the piece is in the processor's cache. On a GPU
the relative positions become further channels of queries and keys, which fused attention takes without a bias:
q k + h[row] + w[column] is the product of [q, h, w] with [k, one-hot row, one-hot column].

Windows at the edge are filled up with zeros, and what the projection makes of zeros is known: it is computed on the
picture's own tokens alone.
"""

from itertools import product

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, get_rel_pos
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Of attention in one piece.
CHUNK_SCORES = 2_000_000
# Tokens that go through the widest layer together where no gradient is kept.
CHUNK_TOKENS = 1024


class ChunkedImageEncoder(ImageEncoderViT):
    """The encoder.

    Attributes:
        recomputes: keep only what goes into each block and compute the block again for its gradient: a fraction of the
            memory for a third more time.
    """

    recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings, B x C x g x g, of normalised and padded pictures, B x 3 x H x W."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = x.contiguous()
        for block in self.blocks:
            if self.recomputes and torch.is_grad_enabled():
                x = checkpoint(_pass_block, block, x, use_reentrant=False)
            else:
                x = _pass_block(block, x)
        return self.neck(x.permute(0, 3, 1, 2))


def _pass_block(block: Block, x: Tensor) -> Tensor:
    """Send tokens, B x H x W x C, through a block."""
    x = x + _attend(block.attn, block.norm1(x), block.window_size)
    if torch.is_grad_enabled():
        return x + block.mlp(block.norm2(x))
    for some in x.view(-1, x.shape[-1]).split(CHUNK_TOKENS):
        some += block.mlp(block.norm2(some))
    return x


def _attend(attention: Attention, x: Tensor, window_size: int) -> Tensor:
    """Let tokens, B x H x W x C, attend to each other in windows of `window_size`; 0: to all."""
    if window_size == 0:
        return _attend_in_windows(attention, x, tuple(x.shape[1:3]))
    # One row of windows after the other stays in a processor's cache; a GPU wants them all.
    rows = x.shape[1] if x.is_cuda else window_size
    window = (window_size, window_size)
    return torch.cat([_attend_in_windows(attention, some, window) for some in x.split(rows, dim=1)], dim=1)


def _attend_in_windows(attention: Attention, x: Tensor, window: tuple[int, int]) -> Tensor:
    """Let tokens, B x H x W x C, attend to each other in windows of (height, width), filled up at the edges."""
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
    with torch.autocast(x.device.type, enabled=False):  # which would compute a softmax of half precision in full
        seen = _attend_with_positions(attention, q, k, v, window)
    seen = seen.view(batch, rows, columns, heads, *window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    seen = seen.reshape(batch, rows * window[0], columns * window[1], -1)[:, :height, :width]
    return attention.proj(seen)


def _attend_with_positions(attention: Attention, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
    """Attend with relative positions.

    Args:
        q, k, v: N x L x d, N pictures or windows times heads, L tokens of (height, width) `size`.
    """
    height, width = size
    by_row = q.new_zeros(len(q), height * width, height)
    by_column = q.new_zeros(len(q), height * width, width)
    if attention.use_rel_pos:
        grid = q.unflatten(1, size)  # N x h x w x d
        rows, columns = get_rel_pos(height, height, attention.rel_pos_h), get_rel_pos(width, width, attention.rel_pos_w)
        by_row = torch.einsum("nhwc,hkc->nhwk", grid, rows.to(q.dtype)).flatten(1, 2)
        by_column = torch.einsum("nhwc,wkc->nhwk", grid, columns.to(q.dtype)).flatten(1, 2)
    attend = _attend_folded if q.is_cuda else _attend_in_pieces
    return attend(q * attention.scale, k, v, by_row, by_column)


def _attend_in_pieces(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend, never with more than `CHUNK_SCORES` at once, nor kept for the gradient.

    Args:
        q, k, v: N x L x d, the queries scaled.
        by_row, by_column: N x L x height and N x L x width, what a query's score gets by the row and column of the key.
    """
    count, length, _ = q.shape
    some = max(1, CHUNK_SCORES // length**2)
    queries = max(1, CHUNK_SCORES // length)
    pieces = []
    for i in range(0, count, some):
        parts = []
        for j in range(0, length, queries):
            here = (slice(i, i + some), slice(j, j + queries))
            inputs = (q[here], k[here[0]], v[here[0]], by_row[here], by_column[here])
            if torch.is_grad_enabled() and q.requires_grad:
                parts.append(checkpoint(_attend_piece, *inputs, use_reentrant=False))
            else:
                parts.append(_attend_piece(*inputs))
        pieces.append(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
    return torch.cat(pieces)


def _attend_piece(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(2)
    add = torch.baddbmm if torch.is_grad_enabled() else Tensor.baddbmm_
    return add(bias, q, k.transpose(1, 2)).softmax(dim=-1) @ v


def _attend_folded(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Do the same with a fused kernel."""
    height, width, channels = by_row.shape[-1], by_column.shape[-1], q.shape[-1]
    places = torch.tensor(list(product(range(height), range(width))), device=q.device)
    marks = torch.cat([F.one_hot(places[:, 0], height), F.one_hot(places[:, 1], width)], dim=1).to(k.dtype)
    q = torch.cat([q, by_row.to(q.dtype), by_column.to(q.dtype)], dim=-1)
    k = torch.cat([k, marks.expand(len(k), -1, -1)], dim=-1)
    more = -q.shape[-1] % 8  # fused kernels want a multiple of 8, and values as wide as keys
    q, k = F.pad(q, (0, more)), F.pad(k, (0, more))
    v = F.pad(v, (0, q.shape[-1] - channels))
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0, :, :channels]
