"""One image as a reader finds it: looked at to its end, its objects decoded, what is wrong noted.

Every format brings jobs, one per image, which processes beside each other turn into these.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from finestsam.config import DatasetConfig
from finestsam.errors import Defect
from finestsam.images.files import inspect_image
from finestsam.masks import Remark, rle_area, rle_box
from finestsam.records import KEPT, SKIPPED_ANNOTATION, SKIPPED_IMAGE, Finding

# Below this on either side there is nothing to segment; SAM's own transform fails on 1 x 4000.
MIN_SIDE_PIXELS = 2


@dataclass(slots=True)
class FoundObject:
    """One object: its mask is sound and has at least one pixel."""

    source_id: int | str | None  # as its file has it
    category: int | str | None  # COCO's category id, or a name where the format has names
    counts: bytes  # compressed run lengths
    area: int  # pixels
    box: list[int]  # XYWH


@dataclass
class CheckedImage:
    """What a job returns. Picklable and small."""

    file_name: str  # as the dataset calls it; unique within it
    image_id: int | None = None  # None: the format has none, one is given
    path: Path | None = None
    size: tuple[int, int] | None = None  # None: the image cannot be used
    digest: str = ""
    objects: list[FoundObject] = field(default_factory=list)
    crowds: list[bytes] = field(default_factory=list)
    crowd_categories: list[int | None] = field(default_factory=list)  # of crowds; None: of any
    findings: list[Finding] = field(default_factory=list)
    annotation_count: int = 0  # objects that the files name, usable or not

    def inspect(self, path: Path, expected_size: tuple[int, int] | None, settings: DatasetConfig) -> None:
        """Read the image to its end and note what was seen.

        Args:
            expected_size: (height, width) that the annotations were drawn on; None: unknown.

        Raises:
            Defect: it cannot be used.
        """
        facts = inspect_image(path, expected_size, settings.images)
        if min(facts.size) < MIN_SIDE_PIXELS:
            raise Defect("too_thin", f"{facts.size[1]} x {facts.size[0]} pixels are too few to segment anything in")
        self.path, self.size, self.digest = path, facts.size, facts.digest
        self.remark(facts.remarks)

    def add(self, source_id: object, category: int | str | None, rle: dict) -> None:
        """Add an object by its mask; one without a pixel is skipped."""
        area = rle_area(rle)
        if area == 0:
            self.skip_object(source_id, Defect("empty_mask", "the mask has no pixel inside the image"))
            return
        self.objects.append(FoundObject(as_source_id(source_id), category, rle["counts"], area, rle_box(rle)))

    def add_crowd(self, rle: dict, category: int | None = None) -> None:
        self.crowds.append(rle["counts"])
        self.crowd_categories.append(category)

    def skip(self, defect: Defect) -> None:
        """Note that the whole image cannot be used."""
        self.size = None
        self._find(defect.code, None, defect.message, SKIPPED_IMAGE)

    def skip_object(self, source_id: object, defect: Defect) -> None:
        self._find(defect.code, source_id, defect.message, SKIPPED_ANNOTATION)

    def remark(self, remarks: list[Remark], source_id: object = None) -> None:
        """Note what is used all the same."""
        for code, message in remarks:
            self._find(code, source_id, message, KEPT)

    def _find(self, code: str, source_id: object, message: str, action: str) -> None:
        self.findings.append(Finding(code, self.file_name, self.image_id, as_source_id(source_id), message, action))


class ImageJob(Protocol):
    """One image that is still to be read; picklable."""

    file_name: str

    def check(self) -> CheckedImage:
        """Read the image and its objects. Raises nothing: what is wrong is in the result."""


def as_source_id(value: object) -> int | str | None:
    """Return an id as its file has it, where json can hold it."""
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
