"""SAM as two calls: image -> embedding, and embedding + prompts -> logits and scores.

Training, validation and prediction all use these two calls, so that an embedding can come from a store and objects can
be decoded in chunks.
"""

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from finestsam.batch import Predictions, Prompts
from finestsam.model.decoder import ImageFeatures, PredictedMasks


class FinestSam(nn.Module):
    """segment_anything's Sam with a differentiable forward pass for one image's prompts.

    Args:
        sam: its weights are shared, not copied.
        multimask_output: true: predict the three masks of decoder tokens 1 to 3; false: the one of token 0.
        encoder_dtype: autocast dtype of the image encoder; None: float32. If it is bfloat16, `compute_image_features`
            returns bfloat16, too. Coordinates stay in float32: bfloat16 would round 1001.3 to 1000.
    """

    def __init__(self, sam: Sam, multimask_output: bool = True, encoder_dtype: torch.dtype | None = None):
        super().__init__()
        self.sam = sam
        self.multimask_output = multimask_output
        self.encoder_dtype = encoder_dtype
        self.semantic_head: nn.Module | None = None  # of models that classify pixels
        self.class_head: nn.Module | None = None  # of models that classify masks

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The heads that there are, by the names of their attributes."""
        return {name: part for name, part in self.named_children() if part is not self.sam}

    @property
    def image_size(self) -> int:
        return self.sam.image_encoder.img_size

    @property
    def device(self) -> torch.device:
        return self.sam.device

    def encode(self, images: list[Tensor]) -> Tensor:
        """Return the embeddings of images, B x C x g x g, float32.

        Args:
            images: each 3 x h x w, uint8, RGB, input frame before padding.
        """
        inputs = torch.stack([self.sam.preprocess(image.float()) for image in images])
        with torch.autocast(inputs.device.type, dtype=self.encoder_dtype, enabled=self.encoder_dtype is not None):
            return self.sam.image_encoder(inputs).float()

    def forward(
        self, embedding: Tensor | None, prompts: Prompts | None, learns_masks: bool = True
    ) -> Predictions | Tensor | None:
        """Predict the masks of one image's prompts.

        If prompts is None, the semantic head predicts logits of classes, B x K x 4g x 4g, for B embeddings.

        Args:
            embedding: 1 x C x g x g.
            prompts: of N objects. With N = 0 nothing is predicted; the call only prepares the gradient synchronisation
                of a rank without objects.
            learns_masks: false: no gradient through the masks, which takes less memory.
        """
        if prompts is None:
            return self.semantic_head(embedding)
        if len(prompts) == 0:
            return None
        sparse, dense = self._embed_prompts(prompts)
        decoder = self.sam.mask_decoder
        features = decoder.compute_image_features(embedding, self.sam.prompt_encoder.get_dense_pe(), dense)
        logits, scores, tokens = decoder.predict(features, sparse, self._mask_slice, learns_masks)
        return Predictions(logits, scores, self.classify(embedding, tokens, logits))

    def classify(self, embedding: Tensor, tokens: Tensor, logits: Tensor) -> Tensor | None:
        """Return the logits of classes, ... x (1 + K); None without a class head. Arguments as of `ClassHead`."""
        return None if self.class_head is None else self.class_head(tokens, logits, embedding)

    def score(self, embedding: Tensor, prompts: Prompts) -> Tensor:
        """Return only the scores, N x M, of prompts without masks; with a gradient.

        Args:
            embedding: 1 x C x g x g.
        """
        sparse, _ = self._embed_prompts(prompts)
        decoder = self.sam.mask_decoder
        features = decoder.compute_image_features(embedding, self.sam.prompt_encoder.get_dense_pe(), self._no_mask)
        return decoder.score(features, sparse, self._mask_slice)

    def compute_image_features(self, embedding: Tensor) -> ImageFeatures:
        """Return the image features for prompts without masks; without gradient.

        Args:
            embedding: 1 x C x g x g.
        """
        features = self.sam.mask_decoder.compute_image_features(
            embedding, self.sam.prompt_encoder.get_dense_pe(), self._no_mask
        )
        # The range of float16 is too small for weights that were not trained in it.
        return features.to(torch.bfloat16) if self.encoder_dtype == torch.bfloat16 else features

    def predict_above(
        self, features: ImageFeatures, prompts: Prompts, min_score: float, only_best: bool = False
    ) -> PredictedMasks:
        """Predict, for prompts without masks, only the masks whose score is above `min_score`.

        Args:
            only_best: at most one mask of each prompt, the one with the highest score.
        """
        sparse, _ = self._embed_prompts(prompts)
        return self.sam.mask_decoder.predict_above(features, sparse, self._mask_slice, min_score, only_best)

    @property
    def _mask_slice(self) -> slice:
        """Which of the decoder's mask tokens are predicted: the three of an ambiguous prompt, or the single one."""
        return slice(1, None) if self.multimask_output else slice(0, 1)

    @property
    def _no_mask(self) -> Tensor:
        return self.sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)

    def _embed_prompts(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return the embeddings of points and boxes, N x t x C, and of masks, N x C x g x g; 1 x C x 1 x 1 for none."""
        points = None if prompts.points is None else (prompts.points, prompts.labels)
        sparse, dense = self.sam.prompt_encoder(points, prompts.boxes, prompts.mask_logits)
        if prompts.mask_logits is None:
            dense = self._no_mask
        elif prompts.has_mask is not None:
            dense = torch.where(prompts.has_mask[:, None, None, None], dense, self._no_mask)
        return sparse, dense
