"""segment_anything's image encoder with the same weights, names and answers, in less memory and time.

Stock attention makes all heads' scores at once, 800 MB for each global block of vit_b, and goes over them five times.
Here they are made, biased, normalised and used a piece at a time while the piece is in the processor's cache, and made
again for their gradient unless they are few. On a GPU the relative positions become further channels of queries and
keys, which fused attention takes without a bias: q k + h[row] + w[column] is the product of [q, h, w] with [k, one-hot
row, one-hot column]. Where a processor has units for products of bfloat16 matrices (AMX), the bias is made as such a
product and fused attention takes it as its mask.

Windows at the edge are filled up with zeros, and what the projection makes of zeros is known: it is computed on the
picture's own tokens alone.
"""

from collections.abc import Callable
from itertools import product

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, window_partition, window_unpartition
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finestsam.model.fft_attention import FftAttention
from finestsam.processor import has_feature

# Of attention in one piece.
CHUNK_SCORES = 2_000_000
# Of a picture in one attention, kept for their gradient: in windows, which most blocks have, and among all tokens. They
# are vit_tiny's at 768 pixels (32 million among all) and vit_b's at 512, and none of vit_b's at 1024 (12 and 201).
KEPT_WINDOW_SCORES, KEPT_GLOBAL_SCORES = 8_000_000, 40_000_000
# Tokens that go through the widest layer together, and through windows, where no gradient is kept: enough for products
# in bfloat16, whose speed halves with fewer, and few enough for a processor's cache.
CHUNK_TOKENS = 2048


class ChunkedImageEncoder(ImageEncoderViT):
    """The encoder.

    Attributes:
        recomputes: keep only what goes into each block and compute the block again for its gradient: less memory for
            more time.
    """

    recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings, B x C x g x g, of normalised and padded pictures, B x 3 x H x W."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = x.contiguous()
        for block in self.blocks:
            # What lies before everything that trains needs no gradient, and less memory and time without.
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
    """Send tokens, B x H x W x C, through the second half of a block; without gradient they are changed in place."""
    if torch.is_grad_enabled():
        return x + block.mlp(block.norm2(x))
    for some in x.view(-1, x.shape[-1]).split(CHUNK_TOKENS):
        some += block.mlp(block.norm2(some))
    return x


def attend(attention: Attention | FftAttention, x: Tensor, window_size: int) -> Tensor:
    """Let tokens, B x H x W x C, attend to each other in windows of `window_size`; 0: to all."""
    if isinstance(attention, FftAttention):
        return _transform(attention, x, window_size)
    batch, height, width = x.shape[:3]
    window = (window_size, window_size) if window_size else (height, width)
    scores = attention.num_heads * height * width * window[0] * window[1]
    keeps_scores = torch.is_grad_enabled() and scores <= (KEPT_WINDOW_SCORES if window_size else KEPT_GLOBAL_SCORES)
    # Some rows of windows after the others stay in a processor's cache; a GPU wants them all.
    some_windows = window[0] * max(1, CHUNK_TOKENS // (batch * window[0] * width))
    rows = height if x.is_cuda or keeps_scores else some_windows
    seen = [_attend_in_windows(attention, some, window, keeps_scores) for some in x.split(rows, dim=1)]
    return torch.cat(seen, dim=1) if len(seen) > 1 else seen[0]


def _transform(attention: FftAttention, x: Tensor, window_size: int) -> Tensor:
    if window_size == 0:
        return attention(x)
    windows, padded_size = window_partition(x, window_size)
    return window_unpartition(attention(windows), window_size, padded_size, x.shape[1:3])


def _attend_in_windows(attention: Attention, x: Tensor, window: tuple[int, int], keeps_scores: bool) -> Tensor:
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
        seen = _attend_with_positions(attention, q, k, v, window, keeps_scores)
    seen = seen.view(batch, rows, columns, heads, *window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    seen = seen.reshape(batch, rows * window[0], columns * window[1], -1)[:, :height, :width]
    return attention.proj(seen)


def _attend_with_positions(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int], keeps_scores: bool
) -> Tensor:
    """Attend with relative positions.

    Args:
        q, k, v: N x L x d, N pictures or windows times heads, L tokens of (height, width) `size`.
    """
    q = q.unflatten(1, size)  # N x h x w x d
    if attention.use_rel_pos:
        by_row, by_column = _compare_rows(q, attention.rel_pos_h), _compare_columns(q, attention.rel_pos_w)
    else:
        by_row, by_column = (q.new_zeros(*q.shape[:3], side) for side in size)
    return _choose_attention(q, keeps_scores)(q * attention.scale, k, v, by_row, by_column)


def _choose_attention(q: Tensor, keeps_scores: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    if q.is_cuda:
        return _attend_folded
    if keeps_scores:
        return _attend_at_once
    if q.dtype == torch.bfloat16 and not torch.is_grad_enabled() and has_feature("amx_bf16"):
        return _attend_masked
    return _attend_in_pieces


def _compare_rows(q: Tensor, table: Tensor) -> Tensor:
    """Return what a query's score with a key gets by their rows, N x h x w x h.

    Args:
        q: N x h x w x d.
        table: 2 h - 1 x d, by the row of the query less that of the key, from 1 - h on.
    """
    count, height, width, _ = q.shape
    products = q @ table.flip(0).T.to(q.dtype)  # N x h x w x 2 h - 1, by the row of the key less that of the query
    length = 2 * height - 1
    # Of query row y the keys' rows 0 to h - 1 are the products from h - 1 - y on: a view, one step back for each row.
    strides = (height * width * length, width * length - 1, length, 1)
    return products.as_strided((count, height, width, height), strides, height - 1)


def _compare_columns(q: Tensor, table: Tensor) -> Tensor:
    """Return the same by columns, N x h x w x w."""
    count, height, width, _ = q.shape
    products = q @ table.flip(0).T.to(q.dtype)
    length = 2 * width - 1
    strides = (height * width * length, width * length, length - 1, 1)
    return products.as_strided((count, height, width, width), strides, width - 1)


def _attend_in_pieces(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend, with about `CHUNK_SCORES` at once and none kept for the gradient.

    Args:
        q: N x h x w x d, scaled.
        k, v: N x L x d.
        by_row, by_column: N x h x w x h and N x h x w x w, what a query's score gets by the row and column of the key.

    Returns:
        N x L x d.
    """
    count, height, width, _ = q.shape
    length = height * width
    k = k.transpose(1, 2).contiguous()  # once, where each piece's product would copy it
    some, rows = max(1, CHUNK_SCORES // length**2), max(1, CHUNK_SCORES // (length * width))
    pieces = []
    for i in range(0, count, some):
        parts = []
        for j in range(0, height, rows):
            here = (slice(i, i + some), slice(j, j + rows))
            inputs = (q[here], k[here[0]], v[here[0]], by_row[here], by_column[here])
            if torch.is_grad_enabled() and q.requires_grad:
                parts.append(checkpoint(_attend_piece, *inputs, use_reentrant=False))
            else:
                parts.append(_attend_piece(*inputs))
        pieces.append(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
    return torch.cat(pieces)


def _attend_piece(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend with some rows of queries; arguments as of `_attend_in_pieces`, but k is N x d x L."""
    bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(3).flatten(1, 2)
    add = torch.baddbmm if torch.is_grad_enabled() else Tensor.baddbmm_
    return add(bias, q.flatten(1, 2), k).softmax(dim=-1) @ v


def _attend_at_once(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Do the same with all scores at once, which are kept for the gradient."""
    by_place = torch.cat([by_row, by_column], dim=-1).flatten(1, 2)
    bias = by_place @ _mark_places(by_row.shape[-1], by_column.shape[-1], k).T
    return torch.baddbmm(bias, q.flatten(1, 2), k.transpose(1, 2)).softmax(dim=-1) @ v


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Do the same with a fused kernel that adds a mask, about `CHUNK_SCORES` of it at once; without a gradient."""
    count, height, width, _ = q.shape
    marks = _mark_places(height, width, k).T.contiguous()
    by_place = torch.cat([by_row, by_column], dim=-1).flatten(1, 2)
    seen, some = torch.empty_like(v), max(1, CHUNK_SCORES // (height * width) ** 2)
    for i in range(0, count, some):
        here = slice(i, i + some)
        bias = by_place[here] @ marks
        inputs = (part[:, None] for part in (q[here].flatten(1, 2), k[here], v[here], bias))
        seen[here] = F.scaled_dot_product_attention(*inputs, scale=1.0)[:, 0]
    return seen


def _mark_places(height: int, width: int, like: Tensor) -> Tensor:
    """Return each place's row and column as ones among zeros, height * width x (height + width)."""
    places = torch.tensor(list(product(range(height), range(width))), device=like.device)
    return torch.cat([F.one_hot(places[:, 0], height), F.one_hot(places[:, 1], width)], dim=1).to(like.dtype)


def _attend_folded(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Do the same with a fused kernel that takes no mask."""
    height, width, channels = by_row.shape[-1], by_column.shape[-1], q.shape[-1]
    marks = _mark_places(height, width, k)
    q = torch.cat([q, by_row, by_column], dim=-1).flatten(1, 2)
    k = torch.cat([k, marks.expand(len(k), -1, -1)], dim=-1)
    more = -q.shape[-1] % 8  # fused kernels want a multiple of 8, and values as wide as keys
    q, k = F.pad(q, (0, more)), F.pad(k, (0, more))
    v = F.pad(v, (0, q.shape[-1] - channels))
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0, :, :channels]
