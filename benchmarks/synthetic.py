"""Synthetic objects for a model with random weights: logits and scores added to the decoder's predictions.

With random weights, every point gives the same weak noise, and the filters drop all masks. The benchmarks need masks
that pass, fail and duplicate each other, as those of a trained model do. Both sides of a comparison get the same
numbers for the same point. The image is a grid of cells. A point in a cell has three masks: nested discs around the
cell's centre, each with its own sharpness and score.
"""

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from finestsam.model.decoder import FoldedMaskDecoder, ImageFeatures

CELLS = 3  # per side
OWN_SHARE = 0.1  # factor of the model's own scores, which differ more between tokens than between points
RADII = (0.2, 0.32, 0.45)  # of the three discs, in cells
FILLING_RADII = (0.9, 1.2, 1.6)  # the same for discs that cover a large part of the image


class SyntheticObjects:
    """The logits and scores of each point. A prompt is matched to its point by its embedding.

    Args:
        encoder: on `device`.
        points: P x 2, XY, input frame, all points that will be prompts.
        fills: whether discs are as large as the image, not as a cell.
    """

    def __init__(self, encoder: PromptEncoder, points: Tensor, side: int, fills: bool, device: str = "cpu"):
        labels = torch.ones(len(points), 1, device=device)
        with torch.no_grad():
            embedded, _ = encoder((points[:, None].to(device), labels), None, None)
        self.embedded = embedded[:, 0]
        generator = torch.Generator().manual_seed(0)
        self.scores = (0.6 + 0.33 * torch.rand(len(points), 3, generator=generator)).to(device)
        self.slopes = (10 + 800 * torch.rand(len(points), 3, 1, 1, generator=generator)).to(device)
        cells = (points / encoder.input_image_size[0] * CELLS).long().clamp(0, CELLS - 1)
        self.cells = (cells[:, 1] * CELLS + cells[:, 0]).to(device)
        self.discs = _render_discs(side, FILLING_RADII if fills else RADII).to(device)

    def find(self, sparse: Tensor) -> Tensor:
        """Return the indices of the prompts' points: the nearest embedding, since batch sizes change the rounding."""
        return torch.cdist(sparse[:, 0], self.embedded).argmin(dim=1)

    def get(self, points: Tensor, masks: Tensor) -> Tensor:
        """Return the logits to add for K masks, K x side x side.

        Args:
            points: K, indices.
            masks: K, numbers of the decoder's mask tokens.
        """
        return self.discs[self.cells[points], masks] * self.slopes[points, masks]


def _render_discs(side: int, radii: tuple[float, ...]) -> Tensor:
    """Return the distance of each logit to the disc's edge, above 0 inside, cells x 3 x side x side, in cells."""
    ticks = (torch.arange(side) + 0.5) / side * CELLS
    centres = torch.arange(CELLS) + 0.5
    squares = (ticks[None] - centres[:, None]).square()  # CELLS x side
    distances = (squares[:, None, :, None] + squares[None, :, None, :]).sqrt().flatten(0, 1)
    return torch.tensor(radii)[None, :, None, None] - distances[:, None]


class StockWithObjects(MaskDecoder):
    """segment_anything's decoder with synthetic objects added to its predictions."""

    objects: SyntheticObjects

    def forward(self, *, sparse_prompt_embeddings: Tensor, **others) -> tuple[Tensor, Tensor]:
        logits, scores = super().forward(sparse_prompt_embeddings=sparse_prompt_embeddings, **others)
        points = self.objects.find(sparse_prompt_embeddings)
        logits += self.objects.get(points[:, None], torch.arange(logits.shape[1]))
        return logits, self.objects.scores[points] + OWN_SHARE * scores


class FoldedWithObjects(FoldedMaskDecoder):
    """finestsam's decoder with the same synthetic objects."""

    objects: SyntheticObjects

    def _attend(self, features: ImageFeatures, sparse: Tensor, masks: slice) -> tuple[Tensor, Tensor]:
        self._points = self.objects.find(sparse)
        return super()._attend(features, sparse, masks)

    def _score(self, tokens: Tensor, masks: slice) -> Tensor:
        return self.objects.scores[self._points] + OWN_SHARE * super()._score(tokens, masks)

    def _make_kept(self, image: Tensor, filters: Tensor, is_kept: Tensor) -> list[Tensor]:
        rows, masks = is_kept.nonzero(as_tuple=True)
        logits = super()._make_kept(image, filters, is_kept)
        return [torch.cat(logits) + self.objects.get(self._points[rows], masks)] if logits else []


def stir_(encoder: nn.Module) -> None:
    """Give random values to weights that are initially zero. With zeros, these blocks would have no effect."""
    for weight in encoder.parameters():
        if not weight.count_nonzero():
            nn.init.normal_(weight, std=0.1 if weight.ndim > 1 else 0.02)
