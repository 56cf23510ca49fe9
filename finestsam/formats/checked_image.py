"""One image after its check: the whole file read, its objects decoded, its problems noted.

Every format gives one job per image. Several processes run the jobs in parallel; each job returns a `CheckedImage`.
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

# SAM's own transform fails on an image of 1 x 4000 pixels.
MIN_SIDE_PIXELS = 2


@dataclass(slots=True)
class FoundObject:
    """One object with a valid mask of at least one pixel."""

    source_id: int | str | None  # the id in the file
    category: int | str | None  # COCO's category id, or a name if the format has names
    counts: bytes  # compressed run lengths
    area: int  # pixels
    box: list[int]  # XYWH


@dataclass
class CheckedImage:
    """The result of a job. Picklable and small."""

    file_name: str  # the name in the dataset, where it is unique
    image_id: int | None = None  # None: the format has no ids; one is assigned later
    path: Path | None = None
    size: tuple[int, int] | None = None  # None: the image cannot be used
    digest: str = ""
    objects: list[FoundObject] = field(default_factory=list)
    crowds: list[bytes] = field(default_factory=list)
    crowd_categories: list[int | None] = field(default_factory=list)  # one for each crowd; None: any category
    findings: list[Finding] = field(default_factory=list)
    annotation_count: int = 0  # objects in the files, usable or not

    def inspect(self, path: Path, expected_size: tuple[int, int] | None, settings: DatasetConfig) -> None:
        """Read the whole image file and note its size, hash and remarks.

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
        """Add an object. An empty mask is skipped."""
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
        self._add_finding(defect.code, None, defect.message, SKIPPED_IMAGE)

    def skip_object(self, source_id: object, defect: Defect) -> None:
        self._add_finding(defect.code, source_id, defect.message, SKIPPED_ANNOTATION)

    def remark(self, remarks: list[Remark], source_id: object = None) -> None:
        """Note remarks about an image or an object that is used anyway."""
        for code, message in remarks:
            self._add_finding(code, source_id, message, KEPT)

    def _add_finding(self, code: str, source_id: object, message: str, action: str) -> None:
        self.findings.append(Finding(code, self.file_name, self.image_id, as_source_id(source_id), message, action))


class ImageJob(Protocol):
    """One image to read; picklable."""

    file_name: str

    def check(self) -> CheckedImage:
        """Read the image and its objects. Raises no Defect: problems are in the result."""


def as_source_id(value: object) -> int | str | None:
    """Return the id in the file, in a form that json can hold; None: there is no valid id."""
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
