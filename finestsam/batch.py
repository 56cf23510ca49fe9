"""Shapes, frames and orders of the values that modules exchange.

N prompts of an image (one or more for each object), P points of a prompt, M masks predicted for it. Points and boxes
are pixels of the input frame (`images/frames.py`), XY and XYXY, float32. g is the side of the embedding in tokens (64
at 1024 pixels): SAM's masks are 4g x 4g logits that cover the padded square.
"""

from collections import Counter
from dataclasses import dataclass, field, fields, replace

from torch import Tensor, device


@dataclass
class Prompts:
    """N prompts. Each kind is given for all N prompts, or is None."""

    points: Tensor | None = None  # N x P x 2
    labels: Tensor | None = None  # N x P, int: 1 inside, 0 outside, -1 no point
    boxes: Tensor | None = None  # N x 4
    mask_logits: Tensor | None = None  # N x 1 x 4g x 4g
    has_mask: Tensor | None = None  # N, bool: whether the prompt's mask_logits are used; None: all are

    def __len__(self) -> int:
        given = [tensor for tensor in (self.points, self.boxes, self.mask_logits) if tensor is not None]
        return len(given[0]) if given else 0

    def __getitem__(self, index: slice | Tensor) -> "Prompts":
        values = (getattr(self, entry.name) for entry in fields(self))
        return Prompts(*(None if value is None else value[index] for value in values))

    def to(self, target: device | str) -> "Prompts":
        values = (getattr(self, entry.name) for entry in fields(self))
        return Prompts(*(None if value is None else value.to(target) for value in values))


@dataclass
class Sample:
    """One image with the objects to train on or to score. Masks are still compressed."""

    image_id: int
    file_name: str
    original_size: tuple[int, int]  # of the variant, if the image is augmented
    input_size: tuple[int, int]
    image: Tensor | None  # 3 x h x w, uint8, RGB, input frame before padding; None: the embedding is given
    prompts: Prompts
    rles: list[dict] = field(default_factory=list)  # N masks, original frame, pycocotools' compressed form
    annotation_ids: list[int] = field(default_factory=list)  # N; the prompts of one object are neighbours
    rows: list[int] = field(default_factory=list)  # N, indices of the objects in the whole training set
    correction_clicks: int = 0  # how often training corrects the first masks
    variant: int = 0  # number of the augmented variant; 0: the plain image
    embedding: Tensor | None = None  # C x g x g, float16, from the store
    background: Prompts = field(default_factory=Prompts)  # single points where no object is, with label 1
    cells: Tensor | None = None  # 4g x 4g: object numbers from 1, see `label_cells`, or classes. None: not needed
    object_classes: list[int] = field(default_factory=list)  # N; empty: not needed
    cell_classes: list[int] = field(default_factory=list)  # classes of the objects in `cells`, by number

    def __len__(self) -> int:
        """Return N, the number of prompts."""
        return len(self.rles)

    @property
    def object_count(self) -> int:
        return len(set(self.annotation_ids))

    @property
    def weights(self) -> list[float]:
        """Return the weight of each of the N prompts: the prompts of one object share the weight 1."""
        counts = Counter(self.annotation_ids)
        return [1 / counts[number] for number in self.annotation_ids]

    def to(self, target: device | str) -> "Sample":
        image = None if self.image is None else self.image.to(target)
        embedding = None if self.embedding is None else self.embedding.to(target)
        cells = None if self.cells is None else self.cells.to(target)
        return replace(
            self,
            image=image,
            embedding=embedding,
            cells=cells,
            prompts=self.prompts.to(target),
            background=self.background.to(target),
        )


@dataclass
class Batch:
    """The images of one forward pass; empty if the rank has no image left in this step."""

    samples: list[Sample]

    @property
    def object_count(self) -> int:
        return sum(sample.object_count for sample in self.samples)

    def to(self, target: device | str) -> "Batch":
        return Batch([sample.to(target) for sample in self.samples])


@dataclass
class Predictions:
    """Output of the decoder for N prompts of one image. M is 3, or 1 without `multimask_output`."""

    logits: Tensor  # N x M x 4g x 4g, float32, above 0 inside the mask
    scores: Tensor  # N x M, float32: the predicted IoU
    class_logits: Tensor | None = None  # N x M x (1 + K): no object, then K categories; None: no class head
