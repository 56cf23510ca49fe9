"""Objects for a model with random weights: logits and scores added to what its decoder predicts.

Random weights predict the same faint noise for every point, which no filter keeps; the benchmarks need candidates that
live, die and repeat each other as a trained model's do. Both sides of a comparison get the same numbers for the same
point. The image is a lattice of cells; the masks of a point in a cell are three nested discs around the cell's
middle, each a little sharper or duller than its neighbours' and with a score of its own.
"""

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from finestsam.model.decoder import FoldedMaskDecoder, ImageFeatures

CELLS = 3  # a side
OWN_SHARE = 0.1  # of the model's own scores, which differ by token more than by point
RADII = (0.2, 0.32, 0.45)  # of the three discs, in cells
FILLING_RADII = (0.9, 1.2, 1.6)  # discs that cover a large part of the image


class SyntheticObjects:
    """The logits and scores of each point, found again by the point's embedding.

    Args:
        encoder: on `device`.
        points: P x 2, XY, input frame, all that will be prompts.
        fills: discs as large as the image instead of a cell.
    """

    def __init__(self, encoder: PromptEncoder, points: Tensor, side: int, fills: bool, device: str = "cpu"):
        labels = torch.ones(len(points), 1, device=device)
        with torch.no_grad():
            embedded, _ = encoder((points[:, None].to(device), labels), None, None)
        self.embedded = embedded[:, 0]
        draw = torch.Generator().manual_seed(0)
        self.scores = (0.6 + 0.33 * torch.rand(len(points), 3, generator=draw)).to(device)
        self.slopes = (10 + 800 * torch.rand(len(points), 3, 1, 1, generator=draw)).to(device)
        cells = (points / encoder.input_image_size[0] * CELLS).long().clamp(0, CELLS - 1)
        self.cells = (cells[:, 1] * CELLS + cells[:, 0]).to(device)
        self.discs = _render_discs(side, FILLING_RADII if fills else RADII).to(device)

    def find(self, sparse: Tensor) -> Tensor:
        """Return which points the prompts are; batches of another size may round them differently."""
        return torch.cdist(sparse[:, 0], self.embedded).argmin(dim=1)

    def get(self, places: Tensor, masks: Tensor) -> Tensor:
        """Return what is added to the logits of K masks, each of a point and a decoder's token, K x side x side."""
        return self.discs[self.cells[places], masks] * self.slopes[places, masks]


def _render_discs(side: int, radii: tuple[float, ...]) -> Tensor:
    """Return how far inside a disc each logit is, cells x 3 x side x side, in cells."""
    ticks = (torch.arange(side) + 0.5) / side * CELLS
    middles = torch.arange(CELLS) + 0.5
    squares = (ticks[None] - middles[:, None]).square()  # cells of a side x side
    distances = (squares[:, None, :, None] + squares[None, :, None, :]).sqrt().flatten(0, 1)
    return torch.tensor(radii)[None, :, None, None] - distances[:, None]


class StockWithObjects(MaskDecoder):
    """segment_anything's decoder, its outputs changed."""

    objects: SyntheticObjects

    def forward(self, *, sparse_prompt_embeddings: Tensor, **others) -> tuple[Tensor, Tensor]:
        logits, scores = super().forward(sparse_prompt_embeddings=sparse_prompt_embeddings, **others)
        places = self.objects.find(sparse_prompt_embeddings)
        logits += self.objects.get(places[:, None], torch.arange(logits.shape[1]))
        return logits, self.objects.scores[places] + OWN_SHARE * scores


class FoldedWithObjects(FoldedMaskDecoder):
    """finestsam's decoder, its outputs changed in the same way."""

    objects: SyntheticObjects

    def _attend(self, view: ImageFeatures, sparse: Tensor, masks: slice) -> tuple[Tensor, Tensor]:
        self._asked = self.objects.find(sparse)
        return super()._attend(view, sparse, masks)

    def _score(self, tokens: Tensor, masks: slice) -> Tensor:
        return self.objects.scores[self._asked] + OWN_SHARE * super()._score(tokens, masks)

    def _make_kept(self, image: Tensor, filters: Tensor, is_kept: Tensor) -> list[Tensor]:
        rows, masks = is_kept.nonzero(as_tuple=True)
        logits = super()._make_kept(image, filters, is_kept)
        return [torch.cat(logits) + self.objects.get(self._asked[rows], masks)] if logits else []


def stir_(encoder: nn.Module) -> None:
    """Give random values to the weights that training starts from zero, without which no block adds anything."""
    for weight in encoder.parameters():
        if not weight.count_nonzero():
            nn.init.normal_(weight, std=0.1 if weight.ndim > 1 else 0.02)
