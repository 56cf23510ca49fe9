"""Attention with relative positions by row and column, in the way that is fastest on each kind of machine.

- CPU: the scores are computed, biased, normalised and used chunk by chunk, while a chunk is in the cache. The backward
  pass computes them again, which takes no longer than keeping them. In bfloat16 it takes longer: there the attention
  weights are kept, unless they are more than `KEPT_SCORES`.
- GPU: the relative positions become further channels of queries and keys, so that fused attention needs no bias:
  q k + h[row] + w[column] is the product of [q, h, w] with [k, one-hot row, one-hot column].
- CPU with AMX (units for bfloat16 matrix products), without a gradient: the bias is one such product, and fused
  attention takes it as its mask.

All functions take q, N x h x w x d, scaled; k and v, N x L x d with L = h w; and by_row and by_column, N x h x w x h
and N x h x w x w, what the row and the column of the key add to a query's score. N is images or windows times heads.
They return N x L x d.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from finestsam.runtime.cpu import has_feature

# Scores in one chunk.
CHUNK_BYTES = 8_000_000
# Most attention weights to keep for the backward pass in bfloat16; vit_tiny has 32 million for an image of 768 pixels.
KEPT_SCORES = 40_000_000


def attend_with_positions(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend in the way that is fastest on this machine."""
    inputs = (q, k, v, by_row, by_column)
    if q.is_cuda:
        return attend_folded(*inputs)
    if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
        return _AttentionInPieces.apply(*inputs)
    if q.dtype == torch.bfloat16 and has_feature("amx_bf16"):
        return attend_masked(*inputs)
    return attend_in_pieces(*inputs)


def attend_in_pieces(
    q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Attend with about `CHUNK_BYTES` of scores at once.

    Args:
        kept: N x L x L, filled with the attention weights.
    """
    columns, seen = k.transpose(1, 2).contiguous(), torch.empty_like(v)  # contiguous once, or each product copies it
    for some, rows, tokens in _list_pieces(q):
        out = None if kept is None else kept[some, tokens]
        weights = _weigh(q[some, rows], columns[some], by_row[some, rows], by_column[some, rows], out)
        torch.bmm(weights, v[some], out=seen[some, tokens])
    return seen


def _list_pieces(q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield chunks of about `CHUNK_BYTES` of scores: slices of N, of the rows, and of the tokens in these rows."""
    count, height, width = q.shape[:3]
    length, scores = height * width, CHUNK_BYTES // q.element_size()
    some, rows = max(1, scores // length**2), min(height, max(1, scores // (length * width)))
    for i in range(0, count, some):
        for j in range(0, height, rows):
            yield slice(i, i + some), slice(j, j + rows), slice(j * width, (j + rows) * width)


def _weigh(q: Tensor, columns: Tensor, by_row: Tensor, by_column: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the attention weights of some rows of queries, n x l x L; `columns` is k transposed, n x d x L."""
    scores = (by_row[..., :, None] + by_column[..., None, :]).flatten(3).flatten(1, 2)
    return torch.softmax(scores.baddbmm_(q.flatten(1, 2), columns), dim=-1, out=out)


class _AttentionInPieces(torch.autograd.Function):
    """`attend_in_pieces` with a backward pass in chunks as well.

    P = softmax(S) are the weights, O = P V the output, G the gradient of O. The gradient of the scores S is
    P (G V' - the sum over channels of G O), row by row: FlashAttention, arXiv 2205.14135, appendix B.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
        count, length, _ = k.shape
        keeps = q.dtype == torch.bfloat16 and count * length**2 <= KEPT_SCORES
        kept = q.new_empty(count, length, length) if keeps else None
        seen = attend_in_pieces(q, k, v, by_row, by_column, kept)
        ctx.save_for_backward(q, k, v, by_row, by_column, seen, kept)
        return seen

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, by_row, by_column, seen, kept = ctx.saved_tensors
        columns, values = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        drift = torch.linalg.vecdot(gradient, seen)[..., None]
        for_q, height, width = torch.empty_like(q), q.shape[1], q.shape[2]
        # Sums over chunks, in float32 and transposed: with transposed weights bfloat16 is several times slower.
        precision = torch.promote_types(k.dtype, torch.float32)
        for_k, for_v = torch.zeros_like(columns, dtype=precision), torch.zeros_like(values, dtype=precision)
        for_rows, for_columns = q.new_empty(*q.shape[:3], height), q.new_empty(*q.shape[:3], width)
        for some, rows, tokens in _list_pieces(q):
            queries, here = q[some, rows], gradient[some, tokens]
            if kept is None:
                weights = _weigh(queries, columns[some], by_row[some, rows], by_column[some, rows])
            else:
                weights = kept[some, tokens]
            for_v[some] += here.transpose(1, 2).contiguous() @ weights
            of_scores = (here @ values[some]).sub_(drift[some, tokens]).mul_(weights)
            for_q[some, rows] = (of_scores @ k[some]).view_as(queries)
            for_k[some] += queries.flatten(1, 2).transpose(1, 2).contiguous() @ of_scores
            by_position = of_scores.view(*queries.shape[:3], height, width)
            torch.sum(by_position, dim=-1, out=for_rows[some, rows])
            torch.sum(by_position, dim=-2, out=for_columns[some, rows])
        for_k, for_v = (each.transpose(1, 2).to(k.dtype) for each in (for_k, for_v))
        return for_q, for_k, for_v, for_rows, for_columns


def attend_masked(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend with a fused kernel that adds the bias as a mask, about `CHUNK_BYTES` at once; without a gradient."""
    count, height, width, _ = q.shape
    marks = _mark_positions(height, width, k).T.contiguous()
    by_position = torch.cat([by_row, by_column], dim=-1).flatten(1, 2)
    seen, some = torch.empty_like(v), max(1, CHUNK_BYTES // q.element_size() // (height * width) ** 2)
    for i in range(0, count, some):
        here = slice(i, i + some)
        bias = by_position[here] @ marks
        inputs = (part[:, None] for part in (q[here].flatten(1, 2), k[here], v[here], bias))
        seen[here] = F.scaled_dot_product_attention(*inputs, scale=1.0)[:, 0]
    return seen


def attend_folded(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend with a fused kernel without a mask: positions become channels of queries and keys."""
    height, width, channels = by_row.shape[-1], by_column.shape[-1], q.shape[-1]
    marks = _mark_positions(height, width, k)
    q = torch.cat([q, by_row, by_column], dim=-1).flatten(1, 2)
    k = torch.cat([k, marks.expand(len(k), -1, -1)], dim=-1)
    more = -q.shape[-1] % 8  # fused kernels want a multiple of 8, and values as wide as keys
    q, k = F.pad(q, (0, more)), F.pad(k, (0, more))
    v = F.pad(v, (0, q.shape[-1] - channels))
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0, :, :channels]


def _mark_positions(height: int, width: int, like: Tensor) -> Tensor:
    """Return the row and the column of each token as one-hot vectors, height * width x (height + width)."""
    positions = torch.tensor(list(product(range(height), range(width))), device=like.device)
    return torch.cat([F.one_hot(positions[:, 0], height), F.one_hot(positions[:, 1], width)], dim=1).to(like.dtype)
