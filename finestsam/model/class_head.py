"""A head beside the mask decoder that gives each mask a category, or says that it is no object."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finestsam.model.head_file import load_head

# The class of what is not an object; those of categories follow.
NO_OBJECT = 0


class ClassHead(nn.Module):
    """From a mask to logits of being no object and of each category.

    It reads two things of a mask. Its token, as the decoder leaves it, knows the prompt and which of several
    nested things this mask is; but SAM was never trained to say what that is. The embedding under the mask has what the
    thing looks like; it is the same for two things of one look. The embedding is read as it is and with each of its
    channels normalised over the image, as some encoders give nearly the same everywhere, and the little that differs is
    what matters.

    The mask itself is taken as it is: no gradient goes through where it lies, so that its shape is the mask losses'
    alone. Tokens and embedding do learn from the classes.

    Args:
        width: channels of tokens and embedding.
        class_count: with `NO_OBJECT`.
    """

    SUFFIX = ".classes.pth"  # of its file, beside that of SAM's weights

    def __init__(self, width: int, class_count: int):
        super().__init__()
        self.width = width
        self.token_norm = nn.LayerNorm(width)
        self.look_norm = nn.LayerNorm(width)
        self.classify = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, class_count))

    def forward(self, tokens: Tensor, logits: Tensor, embedding: Tensor) -> Tensor:
        """Return logits of the classes, ... x (1 + K).

        Args:
            tokens: of masks, ... x C.
            logits: of the same masks, ... x 4g x 4g, inside where above 0.
            embedding: of their image, 1 x C x g x g.
        """
        shares = share_cells(logits, embedding.shape[-1])  # ... x L
        contrast = F.instance_norm(embedding)
        look, stand_out = (shares @ part[0].flatten(1).T for part in (embedding, contrast))
        parts = [self.token_norm(tokens.to(look.dtype)), self.look_norm(look), stand_out]
        return self.classify(torch.cat(parts, dim=-1))


def share_cells(logits: Tensor, side: int) -> Tensor:
    """Return how much of a mask lies in each of the embedding's side x side cells, ... x L; 0 for an empty one.

    Args:
        logits: ... x 4g x 4g; no gradient goes through them.
    """
    masks, size = logits.shape[:-2], logits.shape[-1]
    inside = (logits.detach() > 0).float().reshape(math.prod(masks), 1, size, size)
    areas = F.avg_pool2d(inside, size // side).flatten(1)
    return (areas / areas.sum(dim=1, keepdim=True).clamp(min=1e-9)).view(*masks, side * side)


def load_class_head(weights: Path, names: Sequence[str], width: int) -> ClassHead:
    """Return the head beside a file of SAM's weights.

    Args:
        names: of the categories, as `best.json` has them.
        width: channels of the model's embeddings.

    Raises:
        UserError: there is none, or it is one for other categories.
    """

    def build(state_dict: dict[str, Tensor]) -> ClassHead:
        return ClassHead(len(state_dict["token_norm.weight"]), 1 + len(names))

    return load_head(weights, ClassHead, build, f"the {len(names)} categories", width)
