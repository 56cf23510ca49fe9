"""Heads beside SAM's own, and their files: `ClassHead` classifies masks, `SemanticHead` classifies pixels."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from finestsam.errors import VALUE_ERRORS, UserError
from finestsam.model.weights import load_state_dict

Head = TypeVar("Head", bound=nn.Module)


def head_path(weights: Path, kind: type[nn.Module]) -> Path:
    """Return the path of the head of this kind that belongs to a file of SAM's weights."""
    return weights.with_suffix(kind.SUFFIX)


def is_kept(head: nn.Module) -> bool:
    """Whether a head is kept beside the weights; others serve training alone."""
    return hasattr(head, "SUFFIX")


def load_head(
    weights: Path, kind: type[Head], build: Callable[[dict[str, Tensor]], Head], purpose: str, width: int
) -> Head:
    """Return the head beside a file of SAM's weights, in evaluation mode.

    Args:
        kind: its SUFFIX replaces that of the weights in the name of the head's file.
        build: builds a head for a state dict's shapes; raises KeyError for a head of another kind.
        purpose: what the head classifies according to `best.json`, for the message.
        width: channels of the model's embeddings.

    Raises:
        UserError: the head is missing, or it is for something else.
    """
    path, card_path = head_path(weights, kind), weights.with_suffix(".json")
    if not path.is_file():
        raise UserError(f"{path} is missing, the head that {card_path.name} speaks of; copy it here")
    state_dict = load_state_dict(path)
    try:
        with torch.device("meta"):  # allocates no memory for shapes that the file claims and does not hold
            build(state_dict).load_state_dict(state_dict, assign=True)
        head = build(state_dict)
        head.load_state_dict(state_dict)
    except (RuntimeError, MemoryError, *VALUE_ERRORS):
        raise UserError(f"{path}: not a head for {purpose} of {card_path}") from None
    if head.width != width:
        raise UserError(f"{path}: a head for embeddings of {head.width} channels, those of {weights.name} have {width}")
    return head.eval()


# The class of masks that are no object; the classes of the categories follow.
NO_OBJECT = 0


class ClassHead(nn.Module):
    """Predicts from a mask the logits of no object and of each category.

    It has two inputs. The mask token knows the prompt and which of several nested objects the mask is, but SAM does not
    train it to tell categories apart. The image embedding, averaged over the mask, describes the object's appearance.
    The embedding is used twice: as it is, and with each channel normalised over the image, because some encoders give
    nearly constant embeddings, whose small differences matter.

    No gradient goes through the shape of the mask: only the mask losses train it. Tokens and embedding get gradients.

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
        average, average_contrast = (shares @ part[0].flatten(1).T for part in (embedding, contrast))
        parts = [self.token_norm(tokens.to(average.dtype)), self.look_norm(average), average_contrast]
        return self.classify(torch.cat(parts, dim=-1))


def share_cells(logits: Tensor, side: int) -> Tensor:
    """Return the share of a mask's area in each of the embedding's side x side cells, ... x L; 0 for an empty mask.

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
        UserError: the head is missing, or it is for other categories.
    """

    def build(state_dict: dict[str, Tensor]) -> ClassHead:
        return ClassHead(len(state_dict["token_norm.weight"]), 1 + len(names))

    return load_head(weights, ClassHead, build, f"the {len(names)} categories", width)


class SemanticHead(nn.Module):
    """Predicts from an embedding the logits of classes at a quarter of the input's side.

    Two steps enlarge the embedding by a factor of two each and reduce its channels, so that no tensor is both wide and
    large. Normalisation uses single images: first over the positions of each channel, because some encoders give nearly
    constant embeddings, whose small differences matter; then over the channels of each position.

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
        return self.classify(self.enlarge(self.look(embedding)))


def load_semantic_head(weights: Path, names: Sequence[str], width: int) -> SemanticHead:
    """Return the head beside a file of SAM's weights.

    Args:
        names: of the classes, as `best.json` has them.
        width: channels of the model's embeddings.

    Raises:
        UserError: the head is missing, or it is for other classes.
    """

    def build(state_dict: dict[str, Tensor]) -> SemanticHead:
        return SemanticHead(state_dict["look.1.weight"].shape[0], len(names))

    return load_head(weights, SemanticHead, build, f"the {len(names)} classes", width)
