"""The index of a dataset: images and their objects, masks compressed. What every reader ends in."""

from dataclasses import dataclass, field
from pathlib import Path

from finestsam.data.report import DatasetReport

UNNAMED_CATEGORY = "object"


@dataclass(slots=True)
class Annotation:
    """One object. A few hundred bytes: there can be millions."""

    id: int
    category_id: int
    counts: bytes  # compressed run lengths of the mask, as pycocotools keeps them
    area: int  # pixels inside the mask
    box: list[int]  # of the mask, XYWH
    source_id: int | str | None = None  # the id in the file that it was read from


@dataclass(slots=True)
class Record:
    """One image and its objects."""

    image_id: int
    file_name: str
    path: Path
    size: tuple[int, int]
    annotations: list[Annotation]
    crowds: list[bytes] = field(default_factory=list)  # run lengths of regions where finding anything is no mistake
    digest: str = ""  # of the file's bytes: equal for the same image under two names
    crowd_categories: list[int | None] = field(default_factory=list)  # of crowds, in their order; None: of any

    def rle(self, annotation: Annotation) -> dict:
        return {"size": list(self.size), "counts": annotation.counts}

    def list_crowds(self) -> list[tuple[bytes, int | None]]:
        """Return crowd regions with the id of their category; None: they are of any."""
        return list(zip(self.crowds, self.crowd_categories or [None] * len(self.crowds), strict=True))


@dataclass
class Index:
    """One part of a dataset, read and checked."""

    records: list[Record]  # by image id; those without objects too
    categories: dict[int, str]
    report: DatasetReport
