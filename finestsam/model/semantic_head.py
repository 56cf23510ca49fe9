"""A head that gives each place of an embedding a class."""

from collections.abc import Sequence
from pathlib import Path

from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from finestsam.model.head_file import load_head


class SemanticHead(nn.Module):
    """From an embedding to logits of classes at a quarter of the input's side.

    The embedding is enlarged in two steps of a factor of two, and has fewer channels after each, so that none is both
    wide and large. Norms are those of single images: first over the places of each channel, as some encoders give
    nearly the same everywhere, and the little that differs is what matters; then over the channels of a place.

    Args:
        width: channels of the embedding.
        class_count: with the background.
    """

    SUFFIX = ".semantic.pth"  # of its file, beside that of SAM's weights

    def __init__(self, width: int, class_count: int):
        super().__init__()
        self.width = width
        self.look = nn.Sequential(
            nn.InstanceNorm2d(width, affine=True), nn.Conv2d(width, width, 3, padding=1), LayerNorm2d(width), nn.GELU()
        )
        self.enlarge = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, stride=2), LayerNorm2d(width // 4), nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2), LayerNorm2d(width // 8), nn.GELU(),
        )  # fmt: skip
        self.classify = nn.Conv2d(width // 8, class_count, 1)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the logits, B x K x 4g x 4g, of embeddings, B x C x g x g."""
        return self.classify(self.enlarge(self.compute_image_features(embedding)))


def load_semantic_head(weights: Path, names: Sequence[str], width: int) -> SemanticHead:
    """Return the head beside a file of SAM's weights.

    Args:
        names: of the classes, as `best.json` has them.
        width: channels of the model's embeddings.

    Raises:
        UserError: there is none, or it is one for other classes.
    """

    def build(state_dict: dict[str, Tensor]) -> SemanticHead:
        return SemanticHead(state_dict["look.1.weight"].shape[0], len(names))

    return load_head(weights, SemanticHead, build, f"the {len(names)} classes", width)
