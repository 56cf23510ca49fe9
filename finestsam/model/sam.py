"""A SAM cut where finestsam cuts it: picture -> embedding, and embedding + prompts -> logits and scores.

Training, validation and prediction all go through these two calls, so that an embedding can come from a store and
objects can be decoded in chunks.
"""

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from finestsam.batch import Predictions, Prompts


class FinestSam(nn.Module):
    """segment_anything's Sam with a differentiable forward pass for one picture's prompts.

    Args:
        sam: its weights are shared, not copied.
        multimask_output: answer with the three masks of decoder tokens 1 to 3, or with the one of token 0.
        encoder_dtype: the image encoder computes in this under autocast; None: in float32. Coordinates never pass
            through it: bfloat16 would round 1001.3 to 1000.
    """

    def __init__(self, sam: Sam, multimask_output: bool = True, encoder_dtype: torch.dtype | None = None):
        super().__init__()
        self.sam = sam
        self.multimask_output = multimask_output
        self.encoder_dtype = encoder_dtype

    @property
    def image_size(self) -> int:
        return self.sam.image_encoder.img_size

    @property
    def device(self) -> torch.device:
        return self.sam.device

    def encode(self, images: list[Tensor]) -> Tensor:
        """Return the embeddings of pictures, B x C x g x g, float32.

        Args:
            images: each 3 x h x w, uint8, RGB, input frame before padding.
        """
        inputs = torch.stack([self.sam.preprocess(image.float()) for image in images])
        with torch.autocast(inputs.device.type, dtype=self.encoder_dtype, enabled=self.encoder_dtype is not None):
            return self.sam.image_encoder(inputs).float()

    def forward(self, embedding: Tensor | None, prompts: Prompts) -> Predictions | None:
        """Answer the prompts of one picture.

        Args:
            embedding: 1 x C x g x g.
            prompts: of N objects. None answers none, which arms the gradient synchronisation of a rank without objects.
        """
        if len(prompts) == 0:
            return None
        sparse, dense = self._embed_prompts(prompts)
        logits, scores = self.sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=self.multimask_output,
        )
        return Predictions(logits, scores)

    def _embed_prompts(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        points = None if prompts.points is None else (prompts.points, prompts.labels)
        sparse, dense = self.sam.prompt_encoder(points, prompts.boxes, prompts.mask_logits)
        if prompts.mask_logits is not None and prompts.has_mask is not None:
            no_mask = self.sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            dense = torch.where(prompts.has_mask[:, None, None, None], dense, no_mask)
        return sparse, dense


def upscale_logits(
    logits: Tensor, image_size: int, input_size: tuple[int, int], original_size: tuple[int, int] | None
) -> Tensor:
    """Bring the decoder's logits to the input frame, and on to the original one.

    The same two bilinear steps as segment_anything's `Sam.postprocess_masks`.

    Args:
        logits: N x M x 4g x 4g, of the padded square.
        original_size: None: stop at the input frame.

    Returns:
        N x M x H x W.
    """
    square = F.interpolate(logits, (image_size, image_size), mode="bilinear", align_corners=False)
    inside = square[..., : input_size[0], : input_size[1]]
    if original_size is None or tuple(original_size) == tuple(input_size):
        return inside
    return F.interpolate(inside, original_size, mode="bilinear", align_corners=False)
