"""From a folder to pictures to train on and pictures to validate on."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finestsam.config import DatasetConfig
from finestsam.data.cache import read_coco_cached
from finestsam.data.coco import Index, Record, read_coco
from finestsam.data.dataset import drop_vanishing_objects
from finestsam.data.layouts import Layout, Part, find_layout
from finestsam.data.report import DatasetReport, merge_reports
from finestsam.data.split import split_records
from finestsam.errors import UserError


@dataclass
class LabelledSet:
    """A dataset, read and checked. Pictures without objects are in `val`, where the generator can be wrong on them."""

    train: list[Record]
    val: list[Record]
    categories: list[str]
    report: DatasetReport
    layout: str  # for the screen

    def refuse_defects(self) -> None:
        """Raise a UserError with everything that was found wrong, if anything was."""
        if self.report.defect_count:
            raise UserError("\n".join([f"--strict: {self.report.summarize()}", *self.report.list_examples()]))

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of every picture's name and masks on either side: the same for the same training."""
        digest = hashlib.sha256()
        for records in (self.train, self.val):
            for record in records:
                digest.update(f"{record.image_id} {record.file_name} {record.size}".encode())
                for annotation in record.annotations:
                    digest.update(f"{annotation.id}".encode() + annotation.counts)
            digest.update(b"|")
        return digest.hexdigest()


def read_training_set(settings: DatasetConfig, image_size: int) -> LabelledSet:
    """Read a dataset that lies in one of the known layouts, and split it where it is not.

    Args:
        image_size: pixels of the model's longest side, at which objects can vanish.

    Raises:
        UserError: nothing is left to train on.
    """
    layout = find_layout(Path(settings.path), settings.auto_split)
    indexes = _read_parts(layout, settings)
    if "val" in indexes:
        train, val = indexes["train"].records, indexes["val"].records
    else:
        train, val = split_records(next(iter(indexes.values())).records, settings.val_size, settings.seed)
    report = merge_reports([index.report for index in indexes.values()])
    train = _drop_vanishing(train, image_size, settings, report)
    if not train:
        raise UserError(f"dataset {settings.path}: nothing to train on; {report.summarize()}")
    return LabelledSet(train, val, _list_categories(indexes), report, layout.name)


def read_evaluation_set(settings: DatasetConfig) -> LabelledSet:
    """Read the pictures to evaluate on: the validation side where there is one, a plain set whole."""
    layout = find_layout(Path(settings.path), settings.auto_split)
    if layout.is_plain or "val" in layout.parts:
        index = _read_part(layout.parts["all" if layout.is_plain else "val"], settings)
        val = index.records
    else:
        index = _read_part(next(iter(layout.parts.values())), settings)
        _, val = split_records(index.records, settings.val_size, settings.seed)
    return LabelledSet([], val, list(index.categories.values()), index.report, layout.name)


def _read_parts(layout: Layout, settings: DatasetConfig) -> dict[str, Index]:
    return {name: _read_part(part, settings) for name, part in layout.parts.items()}


def _read_part(part: Part, settings: DatasetConfig) -> Index:
    return read_coco_cached(part, settings.sav) if settings.use_cache else read_coco(part)


def _drop_vanishing(
    records: list[Record], image_size: int, settings: DatasetConfig, report: DatasetReport
) -> list[Record]:
    kept, vanished = drop_vanishing_objects(records, image_size, settings.min_area_pixels)
    for file_name, annotation_id in vanished:
        report.skip_annotation("vanishes", file_name, None, annotation_id, f"vanishes at {image_size} pixels")
    report.usable_annotation_count -= len(vanished)
    return kept


def _list_categories(indexes: dict[str, Index]) -> list[str]:
    names = [name for index in indexes.values() for name in index.categories.values()]
    return list(dict.fromkeys(names))
