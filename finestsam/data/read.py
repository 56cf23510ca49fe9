"""Read a dataset folder into images for training and images for validation."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from finestsam.config import DatasetConfig
from finestsam.data import cache
from finestsam.data.assemble import assemble
from finestsam.data.split import split_as_before, split_records
from finestsam.errors import UserError
from finestsam.formats import coco, labelme, yolo
from finestsam.formats import mask_images as mask_pairs
from finestsam.formats.checked_image import CheckedImage, ImageJob
from finestsam.formats.layouts import Layout, Part, find_layout
from finestsam.records import MIN_AREA_PIXELS, Annotation, DatasetReport, Index, Record, merge_reports
from finestsam.runtime.processes import map_in_processes

READERS = {"coco": coco, "labelme": labelme, "masks": mask_pairs, "yolo": yolo}


@dataclass
class LabelledSet:
    """A dataset, read and checked. Images without objects can be in `val`, to count the generator's false positives."""

    train: list[Record]
    val: list[Record]
    categories: list[str]
    report: DatasetReport
    layout: str  # for messages
    category_names: dict[int, str] = field(default_factory=dict)  # by id

    def refuse_defects(self) -> None:
        """Raise a UserError with all findings if there is a defect."""
        if self.report.defect_count:
            raise UserError("\n".join([f"--strict: {self.report.summarize()}", *self.report.list_examples()]))

    def drop_vanishing(self, image_size: int) -> None:
        """Remove training objects that are too small if the longest side of an image is `image_size` pixels.

        Raises:
            UserError: nothing is left to train on.
        """
        vanished = report_vanishing(self.train, image_size, self.report)
        gone = {id(annotation) for _, annotation in vanished}
        kept = [
            replace(record, annotations=[found for found in record.annotations if id(found) not in gone])
            for record in self.train
        ]
        self.train = [record for record in kept if record.annotations]
        if not self.train:
            raise UserError("\n".join(["nothing to train on", *self.report.list_lines()]))


def read_training_set(settings: DatasetConfig) -> LabelledSet:
    """Read a dataset in one of the known layouts, and split it if it is not split yet.

    Raises:
        UserError: there is nothing to train on.
    """
    layout = find_layout(Path(settings.path), settings.auto_split)
    indexes = read_parts(layout, settings, [name for name in layout.parts if name != "test"])
    report = merge_reports(index.report for index in indexes.values())
    first = next(iter(indexes.values()))
    refuse_empty(settings, first, report)
    if "val" in indexes:
        train, val = first.records, indexes["val"].records
    else:
        train, val = split_records(first.records, settings.val_size, settings.seed)
    return LabelledSet(train, val, list_categories(indexes), report, layout.name, _join_categories(indexes))


def read_evaluation_set(
    settings: DatasetConfig, split: str = "auto", sides: Mapping[str, Collection[str]] | None = None
) -> LabelledSet:
    """Read the images to evaluate on, into `val`.

    Args:
        split: train, val or test, by folders or split as training would; auto: the validation images if there are
            any, all images of a plain dataset.
        sides: the split of the run that the weights come from (see `split_as_before`). The same dataset without
            split folders is split in the same way.

    Raises:
        UserError: there is no such split, or it is empty.
    """
    layout = find_layout(Path(settings.path), settings.auto_split)
    is_split = "val" in layout.parts
    first = next(iter(layout.parts))
    name = "val" if is_split and split == "auto" else split if split in layout.parts else first
    if split == "test" != name:
        raise UserError(f"dataset {settings.path} has no test split, only {', '.join(layout.parts)}")
    index = read_parts(layout, settings, [name])[name]
    refuse_empty(settings, index, index.report)
    records = index.records
    if not is_split and split != "test":
        known = split_as_before(records, sides) if sides else None
        if known or not layout.is_plain or split != "auto":
            train, val = known or split_records(records, settings.val_size, settings.seed)
            records = train if split == "train" else val
    return LabelledSet([], records, list_categories({name: index}), index.report, layout.name, index.categories)


def read_parts(layout: Layout, settings: DatasetConfig, names: list[str]) -> dict[str, Index]:
    """Read parts of a dataset, give their categories common ids, and report images that are in several parts."""
    indexes = {name: _read_part(name, layout.parts[name], settings) for name in names}
    _share_categories(indexes)
    _report_leakage(indexes)
    return indexes


def refuse_empty(settings: DatasetConfig, index: Index, report: DatasetReport) -> None:
    """Raise a UserError with all findings if a dataset has no usable object."""
    if report.usable_annotation_count and any(record.annotations for record in index.records):
        return
    reason = ""
    codes = {finding.code for finding in report.findings if finding.action == "skipped_annotation"}
    if codes == {"crowd"}:
        reason = (
            ": every annotation is a crowd region; if they are objects, set iscrowd to 0 or use --dataset.include_crowd"
        )
    lines = [f"dataset {settings.path}: nothing to train on{reason}", report.summarize(), *report.list_examples()]
    raise UserError("\n".join(lines))


def refuse_unread(settings: DatasetConfig, count: int) -> None:
    """Raise a UserError if no image could be read, although all were readable when they were checked."""
    if count == 0:
        raise UserError(f"dataset {settings.path}: none of its images can be read")


def report_vanishing(records: list[Record], image_size: int, report: DatasetReport) -> list[tuple[Record, Annotation]]:
    """Return the annotations, each with its image, whose area in the input frame is below a pixel.

    The report counts them as skipped. The caller removes them from the records.
    """
    vanished = [
        (record, annotation)
        for record in records
        for annotation in record.annotations
        if annotation.area * (image_size / max(record.size)) ** 2 < MIN_AREA_PIXELS
    ]
    for record, annotation in vanished:
        message = f"vanishes at {image_size} pixels: {annotation.area} of {record.size[1]} x {record.size[0]}"
        report.skip_annotation("vanishes", record.file_name, annotation.source_id, message)
    report.usable_annotation_count -= len(vanished)
    return vanished


def describe_dataset(report: DatasetReport, records: list[Record]) -> dict:
    """Return the content of `dataset_report.json`: counts, findings, and all usable objects."""
    usable = [
        {"id": found.source_id, "file": record.file_name, "area": found.area, "box": found.box}
        for record in records
        for found in record.annotations
    ]
    return report.to_json() | {"usable": usable}


def list_categories(indexes: dict[str, Index]) -> list[str]:
    """Return the category names of all parts, without repeats."""
    names = [name for index in indexes.values() for name in index.categories.values()]
    return list(dict.fromkeys(names))


def _join_categories(indexes: dict[str, Index]) -> dict[int, str]:
    """Return the category names of all parts by id. All parts use the same ids."""
    return {number: name for index in indexes.values() for number, name in index.categories.items()}


def _read_part(name: str, part: Part, settings: DatasetConfig) -> Index:
    if not settings.use_cache:
        return _read_files(name, part, settings)
    cache_file = cache.find_cache_file(part, settings)
    key = cache.compute_key(part, settings, cache_file)
    index = cache.read_index(cache_file, key, part, settings)
    if index is None:
        index = _read_files(name, part, settings)
        cache.write_index(cache_file, key, index)
    return index


def _read_files(name: str, part: Part, settings: DatasetConfig) -> Index:
    if part.labels.is_file() and part.labels.stat().st_size > 100_000_000:
        print(f"reading {part.labels.name}, {part.labels.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
    report = DatasetReport()
    jobs, categories = READERS[part.kind].list_jobs(part, settings, report)
    title = "checking images" if name == "all" else f"checking {name}"
    return assemble(map_in_processes(check_image, jobs, title), categories, settings, report)


def check_image(job: ImageJob) -> CheckedImage:
    """Run one job. At the top level of the module, so that other processes can import it."""
    return job.check()


def _share_categories(indexes: dict[str, Index]) -> None:
    """Give categories of the same name the same id in every part: tools number the categories of each part anew."""
    tables = [index.categories for index in indexes.values()]
    if all(table == tables[0] for table in tables):
        return
    pairs = {(number, name) for table in tables for number, name in table.items()}
    names = list(dict.fromkeys(name for table in tables for name in table.values()))
    if len({number for number, _ in pairs}) == len(pairs) == len(names):  # the parts agree on ids and names
        ids = {name: number for number, name in sorted(pairs)}
    else:
        ids = {name: number for number, name in enumerate(names, start=1)}
    for part_name, index in indexes.items():
        changed = {number: ids[name] for number, name in index.categories.items()}
        for record in index.records:
            for annotation in record.annotations:
                annotation.category_id = changed[annotation.category_id]
            record.crowd_categories = [changed.get(number) for number in record.crowd_categories]
        index.categories = {number: name for name, number in ids.items()}
        missing = len(ids) - len(set(changed.values()))
        message = (
            f"categories differ between the parts and are matched by name; this part lacks {missing} of {len(ids)}"
        )
        index.report.remark("categories_differ", part_name, message)


def _report_leakage(indexes: dict[str, Index]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for name, index in indexes.items():
        mine = {}
        for record in index.records:
            if record.digest in seen:
                message = f"leakage: the same image as {seen[record.digest][1]} of {seen[record.digest][0]}"
                index.report.remark("leakage", record.file_name, message)
            mine[record.digest] = (name, record.file_name)
        seen |= mine
