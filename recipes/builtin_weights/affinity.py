"""An auxiliary task for an encoder that learns from nothing: which neighbouring places belong to the same object.

Trained from scratch together, encoder and decoder collapse to near-constant embeddings, which lower the loss at once.
Affinities can be read off the image from the first step on, so they keep the embeddings apart.

Most neighbours are alike, and an encoder that predicts so everywhere is nearly always right. So the pairs that differ,
the borders, weigh as much together as those that are alike.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from finestsam.data.cells import BACKGROUND

# Of the decoder's grid, in the embedding's token along each side.
CELLS_PER_TOKEN = 4
# Pairs of cells so far apart, along the columns and along the rows.
DISTANCES = (1, 3, 8, 20)


class AffinityHead(nn.Conv2d):
    """A linear read-out of the embedding, which is thrown away after training.

    For each cell it predicts whether it lies in an object, and then for each of `DISTANCES` whether the cell so far
    below, and so far to the right, lies in the same one: logits, B x 9 x 4g x 4g.
    Its weights start at zero, so that a new head does not disturb an encoder that is trained already.
    """

    def __init__(self, channels: int):
        super().__init__(channels, (1 + 2 * len(DISTANCES)) * CELLS_PER_TOKEN**2, kernel_size=1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(embeddings), CELLS_PER_TOKEN)


def compute_affinity_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image, B: the mean over the channels.

    Whether a cell lies in an object counts for all cells; whether two lie in the same one, where one of them lies in
    any, and there the pairs that do and the pairs that do not weigh the same, however many they are. Cells in the
    padding or in a crowd do not count.

    Long-range affinities as a task beside segmentation: arXiv 1706.00120.

    Args:
        logits: B x 9 x 4g x 4g, as `AffinityHead` predicts.
        labels: B x 4g x 4g, as `label_cells` numbers objects.
    """
    losses = [_mean_where(_cross_entropy(logits[:, 0], labels > BACKGROUND), labels >= BACKGROUND)]
    channel = 1
    for distance in DISTANCES:
        for here, there in (
            (labels[:, :-distance], labels[:, distance:]),
            (labels[:, :, :-distance], labels[:, :, distance:]),
        ):
            is_same = (here == there) & (here > BACKGROUND)
            is_other = (here != there) & ((here > BACKGROUND) | (there > BACKGROUND))
            is_other &= (here >= BACKGROUND) & (there >= BACKGROUND)
            entropy = _cross_entropy(logits[:, channel, : here.shape[1], : here.shape[2]], is_same)
            kinds = is_same.any(dim=(1, 2)).long() + is_other.any(dim=(1, 2))
            losses.append((_mean_where(entropy, is_same) + _mean_where(entropy, is_other)) / kinds.clamp(min=1))
            channel += 1
    return sum(losses) / len(losses)


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")


def _mean_where(losses: Tensor, counts: Tensor) -> Tensor:
    """Return each image's mean over the cells that count, B; 0 where there are none."""
    return (losses * counts).sum(dim=(1, 2)) / counts.sum(dim=(1, 2)).clamp(min=1)
