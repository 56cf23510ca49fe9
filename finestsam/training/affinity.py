"""An auxiliary task for an encoder that learns from nothing: which neighbouring places belong to the same object.

A mask decoder that knows nothing yet teaches the encoder mainly to answer the same to every picture, which lowers its
loss at once. Affinities are there to be seen in the picture from the first step on, and keep the encoder looking.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from finestsam.data.cells import BACKGROUND, PADDING

# Of the decoder's grid, in the embedding's token along each side.
CELLS_PER_TOKEN = 4
# Pairs of cells so far apart, along the columns and along the rows.
DISTANCES = (1, 3, 8)


class AffinityHead(nn.Conv2d):
    """A linear read-out of the embedding, which is thrown away after training.

    For each cell it answers whether it lies in an object, and then for each of `DISTANCES` whether the cell so far
    below, and so far to the right, lies in the same one: logits, B x 7 x 4g x 4g.
    """

    def __init__(self, channels: int):
        super().__init__(channels, (1 + 2 * len(DISTANCES)) * CELLS_PER_TOKEN**2, kernel_size=1)

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(embeddings), CELLS_PER_TOKEN)


def affinity_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each picture, B: the mean over its cells, and over the questions asked of them.

    Long-range affinities as a task beside segmentation: arXiv 1706.00120.

    Args:
        logits: B x 7 x 4g x 4g, as `AffinityHead` answers.
        labels: B x 4g x 4g, as `label_cells` numbers objects.
    """
    losses = [_mean_where(logits[:, 0], labels > BACKGROUND, labels != PADDING)]
    channel = 1
    for distance in DISTANCES:
        for here, there in (
            (labels[:, :-distance], labels[:, distance:]),
            (labels[:, :, :-distance], labels[:, :, distance:]),
        ):
            answers = logits[:, channel, : here.shape[1], : here.shape[2]]
            is_same = (here == there) & (here > BACKGROUND)
            losses.append(_mean_where(answers, is_same, (here != PADDING) & (there != PADDING)))
            channel += 1
    return sum(losses) / len(losses)


def _mean_where(logits: Tensor, truth: Tensor, counts: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none") * counts
    return losses.sum(dim=(1, 2)) / counts.sum(dim=(1, 2)).clamp(min=1)
