"""The two halves of a SAM as plain graphs of tensors, which an exporter can follow, for inputs of any size.

They compute what segment_anything computes, with its own modules: what encoder.py and decoder.py save by working in
pieces would be a graph of thousands of pieces.
"""

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn
from torch.nn import functional as F


class EncoderGraph(nn.Module):
    """Image -> embedding, with normalisation and padding inside."""

    def __init__(self, sam: Sam):
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.register_buffer("mean", sam.pixel_mean.clone())
        self.register_buffer("deviation", sam.pixel_std.clone())

    def forward(self, image: Tensor) -> Tensor:
        """Return the embedding, 1 x C x g x g.

        Args:
            image: 1 x 3 x h x w, RGB, 0 to 255, input frame before padding.
        """
        side = self.image_encoder.img_size
        x = (image - self.mean) / self.deviation
        x = F.pad(x, (0, side - x.shape[3], 0, side - x.shape[2]))
        if isinstance(self.image_encoder, ImageEncoderViT):
            return ImageEncoderViT.forward(self.image_encoder, x)
        return self.image_encoder(x)


class DecoderGraph(nn.Module):
    """Embedding and prompts -> the logits and scores of all four mask tokens."""

    def __init__(self, sam: Sam):
        super().__init__()
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.image_size = sam.image_encoder.img_size
        self.register_buffer("image_pe", sam.prompt_encoder.get_dense_pe().detach())

    def forward(
        self, embedding: Tensor, points: Tensor, labels: Tensor, mask_input: Tensor, has_mask_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits, N x 4 x 4g x 4g, and the scores, N x 4.

        Args:
            embedding: 1 x C x g x g.
            points: N x P x 2, XY, input frame.
            labels: N x P, float: 1 inside, 0 outside, 2 and 3 a box's corners, -1 no point.
            mask_input: 1 x 1 x 4g x 4g, the logits of a mask that all N prompts bring.
            has_mask_input: 1, float: 1 where `mask_input` counts, 0 where there is none.
        """
        encoder = self.prompt_encoder
        masks = encoder.mask_downscaling(mask_input)
        no_mask = encoder.no_mask_embed.weight[:, :, None, None]
        return self.mask_decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=self.image_pe,
            sparse_prompt_embeddings=self._embed_points(points, labels[..., None]),
            dense_prompt_embeddings=torch.where(has_mask_input[:, None, None, None] > 0, masks, no_mask),
        )

    def _embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return N x P x C; segment_anything writes into masked positions, which no exporter can follow."""
        encoder = self.prompt_encoder
        position_encoding = encoder.pe_layer._pe_encoding((points + 0.5) / self.image_size)
        embedded = torch.where(labels == -1, encoder.not_a_point_embed.weight, position_encoding)
        for label, kind in enumerate(encoder.point_embeddings):
            embedded = torch.where(labels == label, position_encoding + kind.weight, embedded)
        return embedded
