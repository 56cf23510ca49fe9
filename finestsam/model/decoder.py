"""segment_anything's mask decoder with the same weights, names and outputs, and a third of the arithmetic.

What it saves is below; results differ only by the order of sums. g is the side of the embedding in tokens, L = g * g;
a prompt has T tokens (5 to 9) of C channels, attention has H heads of d channels:

- Before the first layer the image's tokens are the same for every prompt: `compute_image_features` projects them once.
- Afterwards they differ by prompt, and stock attention projects all L of them. But a projection W of the image can be
  moved to the other side: q (W x) = (q W) x, and the sum P (x W) = (P x) W. Only products with H * T columns touch the
  L tokens, and the image is never projected. A bias of the keys adds the same number to all scores of a row, so it
  cancels in the softmax.
- Stock attention adds the position encoding to the image before every projection. The projection of the encoding
  does not depend on the prompt and is computed once; the sum is never computed.
- A transposed convolution whose stride is its size is one matrix product over channels.
- Only the wanted mask tokens get a mask, and only masks whose score is high enough are upscaled.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from finestsam.model.lora import weight_of

# Image tokens in one pass on the CPU: those of 16 prompts of vit_b, 32 in bfloat16, which read the weights once. With
# a gradient half of it: more takes memory and is no faster.
CHUNK_BYTES = 70_000_000


@dataclass
class ImageFeatures:
    """What the decoder computes once for an image. S is 1, or N where mask prompts change the image."""

    tokens: Tensor  # S x L x C: the embedding plus the mask prompts
    keys: Tensor  # S x H x L x d, of the first layer's attention from tokens to image
    values: Tensor  # the same
    queries: Tensor  # S x H x L x d, of the first layer's attention from image to tokens
    # Each 1 x H x L x d: what position encodings add to the keys of later attentions from tokens to image.
    key_positions: list[Tensor]
    # Each 1 x H x L x d: what position encodings and bias add to the queries of later attentions from image to tokens.
    query_positions: list[Tensor]

    @property
    def side(self) -> int:
        """Return g."""
        return math.isqrt(self.tokens.shape[1])

    def to(self, dtype: torch.dtype) -> "ImageFeatures":
        """Return the features in another precision, which the decoder then uses for the image tokens.

        Prompt tokens and scores keep their precision. Only without a gradient.
        """
        lists = ([positions.to(dtype) for positions in some] for some in (self.key_positions, self.query_positions))
        parts = (self.tokens, self.keys, self.values, self.queries)
        return ImageFeatures(*(part.to(dtype) for part in parts), *lists)

    def __getitem__(self, part: slice) -> "ImageFeatures":
        """Return the features of a slice of the prompts."""
        if len(self.tokens) == 1:
            return self
        parts = (self.tokens[part], self.keys[part], self.values[part], self.queries[part])
        return ImageFeatures(*parts, self.key_positions, self.query_positions)


@dataclass
class PredictedMasks:
    """The masks of N prompts whose score is high enough: k of N x M."""

    scores: Tensor  # N x M
    is_kept: Tensor  # N x M, bool
    logits: Tensor  # k x 4g x 4g, in the order of is_kept
    tokens: Tensor  # k x C, the mask tokens of these masks


class FoldedMaskDecoder(MaskDecoder):
    """The decoder. `forward` is segment_anything's own; `compute_image_features`, then `predict` is the fast way."""

    def compute_image_features(self, embedding: Tensor, image_pe: Tensor, dense: Tensor) -> ImageFeatures:
        """Compute what all prompts of an image share.

        Args:
            embedding: 1 x C x g x g.
            image_pe: 1 x C x g x g, the position encoding.
            dense: S x C x g x g, or what broadcasts to it: the embeddings of mask prompts, or of none.
        """
        # Contiguous by token, because every prompt copies them.
        tokens = (embedding + dense).flatten(2).transpose(1, 2).contiguous()
        image_pe = image_pe.flatten(2).transpose(1, 2)
        placed = tokens + image_pe
        first, *later = self.transformer.layers
        to_image = [layer.cross_attn_token_to_image for layer in later] + [self.transformer.final_attn_token_to_image]
        to_tokens = [layer.cross_attn_image_to_token for layer in later]
        first_to_image, first_to_tokens = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        return ImageFeatures(
            tokens,
            keys=_split_heads(F.linear(placed, weight_of(first_to_image.k_proj)), first_to_image),
            values=_split_heads(first_to_image.v_proj(tokens), first_to_image),
            queries=_split_heads(first_to_tokens.q_proj(placed), first_to_tokens),
            key_positions=[_split_heads(F.linear(image_pe, weight_of(layer.k_proj)), layer) for layer in to_image],
            query_positions=[_split_heads(layer.q_proj(image_pe), layer) for layer in to_tokens],
        )

    def predict(
        self, features: ImageFeatures, sparse: Tensor, masks: slice, learns_masks: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the masks of prompts.

        Args:
            sparse: N x t x C, the embeddings of points and boxes.
            masks: the slice of the four mask tokens to predict with.
            learns_masks: false: no gradient through the logits, which saves its memory.

        Returns:
            Logits, N x M x 4g x 4g, scores, N x M, and the mask tokens, N x M x C.
        """
        logits, scores, read = [], [], []
        for part in self._list_chunks(features, len(sparse)):
            tokens, image = self._attend(features[part], sparse[part], masks)
            scores.append(self._score(tokens, masks))
            read.append(tokens[:, 1:])
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns_masks):
                logits.append(self.upscale(image, self._make_filters(tokens, masks)))
        return torch.cat(logits), torch.cat(scores), torch.cat(read)

    def predict_above(
        self, features: ImageFeatures, sparse: Tensor, masks: slice, min_score: float, only_best: bool = False
    ) -> PredictedMasks:
        """Predict only the masks whose score is above `min_score`; arguments as of `predict`.

        Args:
            only_best: at most one mask of each prompt, the one with the highest score.
        """
        side = 4 * features.side
        logits, scores, is_kept, read = [sparse.new_zeros(0, side, side)], [], [], []
        for part in self._list_chunks(features, len(sparse)):
            tokens, image = self._attend(features[part], sparse[part], masks)
            scores.append(self._score(tokens, masks))
            is_kept.append(scores[-1] > min_score)
            if only_best:
                is_kept[-1] &= F.one_hot(scores[-1].argmax(dim=1), scores[-1].shape[1]).bool()
            logits += self._make_kept(image, self._make_filters(tokens, masks), is_kept[-1])
            read.append(tokens[:, 1:][is_kept[-1]])
        return PredictedMasks(torch.cat(scores), torch.cat(is_kept), torch.cat(logits), torch.cat(read))

    def score(self, features: ImageFeatures, sparse: Tensor, masks: slice) -> Tensor:
        """Return only the scores, N x M; arguments as of `predict`."""
        parts = self._list_chunks(features, len(sparse))
        return torch.cat([self._score(self._attend(features[part], sparse[part], masks)[0], masks) for part in parts])

    def _make_kept(self, image: Tensor, filters: Tensor, is_kept: Tensor) -> list[Tensor]:
        """Return the masks that `is_kept`, n x M, selects, in its order; each list entry is k x 4g x 4g."""
        rows = is_kept.any(dim=1).nonzero()[:, 0].tolist()
        if image.is_cuda and rows:
            return [self.upscale(image[rows], filters[rows])[is_kept[rows]]]
        return [self.upscale(image[row, None], filters[row, None, is_kept[row]])[0] for row in rows]

    def upscale(self, image: Tensor, filters: Tensor) -> Tensor:
        """Compute masks: the products of the upscaled image tokens with the filters.

        Args:
            image: n x L x C, the image tokens after the transformer.
            filters: n x M x C / 8, one for each mask.

        Returns:
            Logits, n x M x 4g x 4g.
        """
        first, norm, activation, second, last_activation = self.output_upscaling
        count, length, _ = image.shape
        side = math.isqrt(length)
        middle = F.linear(image, *_as_matrix(first, image.dtype)).view(count * length * 4, -1)
        middle = activation(_normalize(norm, middle))
        fine = last_activation(F.linear(middle, *_as_matrix(second, image.dtype))).view(count, length * 16, -1)
        return _arrange_pixels((filters.to(image.dtype) @ fine.transpose(1, 2)).to(filters.dtype), side)

    def _list_chunks(self, features: ImageFeatures, count: int) -> Iterator[slice]:
        """Yield slices of prompts that go through the decoder together."""
        tokens, limit = features.tokens, CHUNK_BYTES // 2 if torch.is_grad_enabled() else CHUNK_BYTES
        size = count if tokens.is_cuda else max(1, limit // (tokens[0].numel() * tokens.element_size()))
        for start in range(0, count, size):
            yield slice(start, start + size)

    def _attend(self, features: ImageFeatures, sparse: Tensor, masks: slice) -> tuple[Tensor, Tensor]:
        """Run the transformer.

        Returns:
            The score token and the mask tokens, n x (1 + M) x C, and the image tokens, n x L x C.
        """
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        prompt = torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)
        tokens, image = prompt, features.tokens.expand(len(sparse), -1, -1)
        for number, layer in enumerate(self.transformer.layers):
            tokens = _attend_to_each_other(layer, tokens, prompt)
            to_image, to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            if number == 0:
                seen = _attend_to_projected(to_image, tokens + prompt, features.keys, features.values)
            else:
                seen = _attend_to_image(to_image, tokens + prompt, image, features.key_positions[number - 1])
            tokens = layer.norm2(tokens + seen)
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            if number == 0:
                weights = _weigh_tokens(to_tokens, tokens + prompt, features.queries, None)
            else:
                weights = _weigh_tokens(to_tokens, tokens + prompt, features.query_positions[number - 1], image)
            # In place where no gradient needs the old values and the prompts no longer share the tensor.
            add = torch.baddbmm if number == 0 or torch.is_grad_enabled() else Tensor.baddbmm_
            added = _fold_values(to_tokens, tokens).to(image.dtype)
            image = _normalize(layer.norm4, add(image, weights.transpose(1, 2), added))
        last = self.transformer.final_attn_token_to_image
        # The final attention only goes from tokens to image, so unused tokens can be left out.
        read = [0, *range(1, 1 + self.num_mask_tokens)[masks]]
        tokens, prompt = tokens[:, read], prompt[:, read]
        tokens = tokens + _attend_to_image(last, tokens + prompt, image, features.key_positions[-1])
        return self.transformer.norm_final_attn(tokens), image

    def _score(self, tokens: Tensor, masks: slice) -> Tensor:
        return self.iou_prediction_head(tokens[:, 0])[:, masks]

    def _make_filters(self, tokens: Tensor, masks: slice) -> Tensor:
        networks = self.output_hypernetworks_mlps[masks]
        return torch.stack([network(tokens[:, 1 + number]) for number, network in enumerate(networks)], dim=1)


def _attend_to_each_other(layer: TwoWayAttentionBlock, tokens: Tensor, prompt: Tensor) -> Tensor:
    if layer.skip_first_layer_pe:
        return layer.norm1(layer.self_attn(q=tokens, k=tokens, v=tokens))
    placed = tokens + prompt
    return layer.norm1(tokens + layer.self_attn(q=placed, k=placed, v=tokens))


def _attend_to_projected(attention: Attention, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from tokens, n x T x C, to an image whose keys and values are already computed."""
    weights = _compare(_scale_queries(attention, tokens).to(keys.dtype), keys).softmax(dim=-1)  # n x H x T x L
    if len(values) == 1:
        count, heads, length, _ = weights.shape
        seen = weights.transpose(0, 1).reshape(heads, count * length, -1) @ values[0]
        seen = seen.view(heads, count, length, -1).permute(1, 2, 0, 3)
    else:
        seen = (weights @ values).transpose(1, 2)
    return attention.out_proj(seen.flatten(2).to(tokens.dtype))


def _attend_to_image(attention: Attention, tokens: Tensor, image: Tensor, key_positions: Tensor) -> Tensor:
    """Attend from tokens, n x T x C, to an image, n x L x C, without computing its keys and values."""
    queries = _scale_queries(attention, tokens)
    folded = queries @ _split_rows(weight_of(attention.k_proj), attention)  # n x H x T x C
    by_position = _compare(queries.to(image.dtype), key_positions).flatten(1, 2)
    logits = by_position.baddbmm_(folded.flatten(1, 2).to(image.dtype), image.transpose(1, 2))
    seen = (logits.softmax(dim=-1) @ image).view(folded.shape).to(tokens.dtype)  # n x H x T x C
    seen = seen @ _split_rows(weight_of(attention.v_proj), attention).transpose(1, 2)  # n x H x T x d
    return attention.out_proj(seen.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _weigh_tokens(attention: Attention, tokens: Tensor, queries: Tensor, image: Tensor | None) -> Tensor:
    """Return the attention weights from image tokens to prompt tokens, n x H T x L.

    Args:
        tokens: n x T x C.
        queries: of the image, S x H x L x d; where `image` is given, only the part of the position encoding.
    """
    keys = _split_heads(attention.k_proj(tokens), attention) / math.sqrt(queries.shape[-1])
    logits = _compare(keys.to(queries.dtype), queries)  # n x H x T x L
    if image is not None:
        folded = (keys @ _split_rows(weight_of(attention.q_proj), attention)).flatten(1, 2).to(image.dtype)
        logits = logits.flatten(1, 2).baddbmm_(folded, image.transpose(1, 2)).view(logits.shape)
    return logits.softmax(dim=2).flatten(1, 2)


def _fold_values(attention: Attention, tokens: Tensor) -> Tensor:
    """Return what each of n x T x C tokens adds to an image token that attends to it with weight 1, n x H T x C."""
    values = _split_heads(attention.v_proj(tokens), attention)
    output = _split_rows(weight_of(attention.out_proj).T, attention)  # H x d x C
    # The weights of an image token add up to one in each head, so each value carries a share of the bias.
    return (values @ output + attention.out_proj.bias / attention.num_heads).flatten(1, 2)


def _scale_queries(attention: Attention, tokens: Tensor) -> Tensor:
    queries = _split_heads(attention.q_proj(tokens), attention)
    return queries / math.sqrt(queries.shape[-1])


def _compare(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the products n x H x T x L of n x H x T x d with S x H x L x d, whose S is n or 1."""
    if len(keys) > 1:
        return queries @ keys.transpose(2, 3)
    count, heads, length, _ = queries.shape
    products = queries.transpose(0, 1).reshape(heads, count * length, -1) @ keys[0].transpose(1, 2)
    return products.view(heads, count, length, -1).transpose(0, 1)


def _split_heads(projected: Tensor, attention: Attention) -> Tensor:
    """Bring n x L x Hd to n x H x L x d."""
    return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _split_rows(weight: Tensor, attention: Attention) -> Tensor:
    """Bring Hd x C to H x d x C."""
    return weight.unflatten(0, (attention.num_heads, -1))


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise the last dimension, in the precision of x."""
    return F.layer_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _arrange_pixels(masks: Tensor, side: int) -> Tensor:
    """Return masks, n x M x 4g x 4g, from their pixels token by token, n x M x 16 L.

    The row of a pixel is made of three y, of the token, the first and the second step; the column likewise of three x.
    """
    steps = masks.view(*masks.shape[:2], side, side, 2, 2, 2, 2)
    if masks.device.type == "cpu":  # two neighbours move as one complex number, in a fifth of the time
        placed = torch.view_as_real(torch.view_as_complex(steps).permute(0, 1, 2, 4, 6, 3, 5).contiguous())
    else:
        placed = steps.permute(0, 1, 2, 4, 6, 3, 5, 7)
    return placed.reshape(*masks.shape[:2], 4 * side, 4 * side)


def _as_matrix(convolution: nn.ConvTranspose2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a transposed convolution of size and stride 2 as the weight, 4 c x C, and bias, 4 c, of a linear layer."""
    return convolution.weight.permute(2, 3, 1, 0).flatten(0, 2).to(dtype), convolution.bias.repeat(4).to(dtype)
