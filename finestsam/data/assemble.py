"""Build an index from checked images: ids, categories, duplicates, counts."""

from collections.abc import Iterable

from finestsam.config import DatasetConfig
from finestsam.formats.checked_image import CheckedImage
from finestsam.masks import Remark
from finestsam.records import UNNAMED_CATEGORY, Annotation, DatasetReport, Index, Record


def assemble(
    images: Iterable[CheckedImage],
    categories: dict[int, str] | None,
    settings: DatasetConfig,
    report: DatasetReport,
) -> Index:
    """Return the index of one part of a dataset.

    Args:
        categories: names by id; None: the objects have names, or values of mask images.
        report: receives the findings of the images and of this function.
    """
    records: list[Record] = []
    table = _CategoryTable(categories)
    for image in images:
        report.image_count += 1
        report.annotation_count += image.annotation_count
        report.findings += image.findings
        if image.size is None:
            continue
        image_id = report.image_count if image.image_id is None else image.image_id
        record = Record(image_id, image.file_name, image.path, image.size, [], image.crowds, image.digest)
        _add_objects(record, image, table, settings, report)
        record.crowd_categories = [number if number in table.names else None for number in image.crowd_categories]
        records.append(record)
    _number_annotations(records, report)
    report.background_image_count = sum(not record.annotations for record in records)
    report.usable_image_count = len(records) - report.background_image_count
    report.usable_annotation_count = sum(len(record.annotations) for record in records)
    return Index(sorted(records, key=lambda record: record.image_id), table.names, report)


def _add_objects(
    record: Record, image: CheckedImage, table: "_CategoryTable", settings: DatasetConfig, report: DatasetReport
) -> None:
    has_ids = image.image_id is not None  # formats without image ids number their objects from 1 in each image
    seen: dict[bytes, object] = {}
    for found in image.objects:
        if found.counts in seen:
            message = f"the same mask as annotation {seen[found.counts]}"
            if settings.dedup:
                report.skip_annotation("duplicate_mask", record.file_name, found.source_id, message)
                continue
            report.remark("duplicate_mask", record.file_name, message, found.source_id)
        seen[found.counts] = found.source_id
        category_id, remark = table.find(found.category)
        if remark:
            report.remark(remark[0], record.file_name, remark[1], found.source_id)
        # -1: no id yet. `_number_annotations` assigns one when all ids in the file are known.
        number = int(found.source_id) if has_ids and _is_number(found.source_id) else -1
        record.annotations.append(Annotation(number, category_id, found.counts, found.area, found.box, found.source_id))


class _CategoryTable:
    """Categories by id. It grows if objects have names."""

    def __init__(self, names: dict[int, str] | None):
        self.names = dict(names or {})
        self._takes_names = names is None
        self._ids = {name: category_id for category_id, name in self.names.items()}

    def find(self, category: int | str | None) -> tuple[int, Remark | None]:
        """Return the id of a category, and a remark if the file does not define it."""
        if isinstance(category, str):
            return self._add(category), None
        if category is None:
            remark = None if self._takes_names else ("no_category", f"no category_id; `{UNNAMED_CATEGORY}`")
            return self._add(UNNAMED_CATEGORY), remark
        if category in self.names:
            return category, None
        if self._takes_names:
            return self._add(f"value {category}", category), None
        known = ", ".join(map(str, sorted(self.names)[:10]))
        message = f"category_id {category} is not in the file's categories {known}"
        return self._add(f"category {category}", category), ("unknown_category", message)

    def _add(self, name: str, category_id: int | None = None) -> int:
        if name not in self._ids:
            self._ids[name] = max(self.names, default=0) + 1 if category_id is None else category_id
            self.names[self._ids[name]] = name
        return self._ids[name]


def _number_annotations(records: list[Record], report: DatasetReport) -> None:
    """Give every annotation a unique id. Of several with the same id, the first keeps it."""
    annotations = [annotation for record in records for annotation in record.annotations]
    next_id = max((annotation.id for annotation in annotations), default=0) + 1
    seen: set[int] = set()
    examples = []
    for annotation in annotations:
        if annotation.id in seen or annotation.id < 0:
            if annotation.id >= 0:
                examples.append(annotation.source_id)
            annotation.id, next_id = next_id, next_id + 1
        seen.add(annotation.id)
    if examples:
        listed = ", ".join(map(str, examples[:5]))
        report.remark(
            "renumbered", "", f"{len(examples)} annotations had the id of another and got a new one: {listed}"
        )


def _is_number(source_id: object) -> bool:
    return isinstance(source_id, int) or (isinstance(source_id, str) and source_id.isdecimal() and len(source_id) < 19)
