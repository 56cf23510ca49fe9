"""Read COCO annotations: every entry checked, masks kept compressed, what is skipped reported."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finestsam.data.layouts import Part
from finestsam.data.report import DatasetReport
from finestsam.errors import Defect, UserError
from finestsam.images import read_image_size
from finestsam.masks import rle_area, rle_box, segmentation_to_rle

UNNAMED_CATEGORY = "object"


@dataclass(slots=True)
class Annotation:
    """One object. A few hundred bytes: there can be millions."""

    id: int
    category_id: int
    counts: bytes  # compressed run lengths of the mask, as pycocotools keeps them
    area: int  # pixels inside the mask
    box: list[int]  # of the mask, XYWH


@dataclass(slots=True)
class Record:
    """One picture and its objects."""

    image_id: int
    file_name: str
    path: Path
    size: tuple[int, int]
    annotations: list[Annotation]

    def rle(self, annotation: Annotation) -> dict:
        return {"size": list(self.size), "counts": annotation.counts}


@dataclass
class Index:
    """One annotation file, read."""

    records: list[Record]  # by image id; those without objects too
    categories: dict[int, str]
    report: DatasetReport


def read_coco(part: Part) -> Index:
    """Read an annotation file and look every picture up.

    Raises:
        UserError: the file cannot be read as COCO annotations, or nothing in it can be used.
    """
    content = load_json(part.annotation_file)
    _check_structure(content, part.annotation_file)
    report = DatasetReport(image_count=len(content["images"]), annotation_count=len(content["annotations"]))
    categories = _read_categories(content, part, report)
    records = _read_images(content["images"], part, report)
    for entry in content["annotations"]:
        _add_annotation(entry, records, categories, report)
    return _finish(records, categories, report, part)


def load_json(path: Path) -> object:
    """Parse a json file, with or without a byte-order mark."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be COCO annotations") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _check_structure(content: object, path: Path) -> None:
    if isinstance(content, list):
        is_results = content and isinstance(content[0], dict) and "image_id" in content[0]
        hint = "; this looks like a list of COCO results, which has no pictures to train on" if is_results else ""
        raise UserError(f"{path}: expected an object with images, annotations and categories, got a list{hint}")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object with images, annotations and categories, got {content!r:.40}")
    if "shapes" in content:
        raise UserError(f"{path}: this is labelme's format, not COCO's")
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise UserError(f"{path}: `{key}` is missing, or not a list")


def _read_categories(content: dict, part: Part, report: DatasetReport) -> dict[int, str]:
    entries = content.get("categories")
    if not isinstance(entries, list) or not entries:
        report.remark(
            "no_categories", part.annotation_file.name, f"no categories; every object is `{UNNAMED_CATEGORY}`"
        )
        return {}
    return {
        _as_id(entry.get("id")): str(entry.get("name", UNNAMED_CATEGORY))
        for entry in entries
        if isinstance(entry, dict)
    }


def _read_images(entries: list, part: Part, report: DatasetReport) -> dict[int, Record]:
    records: dict[int, Record] = {}
    find_file = FileFinder(part.images_dir)
    for entry in entries:
        file_name = entry.get("file_name") if isinstance(entry, dict) else None
        image_id = _as_id(entry.get("id")) if isinstance(entry, dict) else None
        try:
            if image_id is None:
                raise Defect("no_image_id", "an image without an id")
            if not isinstance(file_name, str) or not file_name:
                raise Defect("no_file_name", "an image without a file name")
            record = _read_image_entry(entry, image_id, file_name, find_file)
        except Defect as defect:
            report.skip_image(defect.code, str(file_name), image_id, defect.message)
            continue
        known = records.setdefault(image_id, record)
        if known.file_name != file_name:
            raise UserError(
                f"{part.annotation_file}: image id {image_id} stands for {known.file_name} and for {file_name}"
            )
    return records


def _read_image_entry(entry: dict, image_id: int, file_name: str, find_file: "FileFinder") -> Record:
    path = find_file(file_name)
    upright = read_image_size(path)
    size = tuple(_as_id(entry.get(side)) or length for side, length in zip(("height", "width"), upright, strict=True))
    if size != upright and size != upright[::-1]:
        raise Defect(
            "size_mismatch",
            f"size mismatch: the annotations say {size[1]} x {size[0]}, the file has {upright[1]} x {upright[0]}",
        )
    return Record(image_id, file_name, path, size, [])


class FileFinder:
    """Look up the pictures that an annotation file names, which is never trusted to stay inside its folder."""

    def __init__(self, images_dir: Path):
        self.images_dir = images_dir
        self._by_name: dict[str, list[Path]] | None = None

    def __call__(self, file_name: str) -> Path:
        """Return the path of a picture.

        Raises:
            Defect: it is not there, or outside the folder and not found inside by its bare name.
        """
        parts = [part for part in re.split(r"[\\/]+", file_name) if part not in ("", ".")]
        leaves = file_name.startswith(("/", "\\")) or ".." in parts or ":" in file_name or "\0" in file_name
        if not leaves:
            path = self.images_dir.joinpath(*parts)
            if path.exists():
                return path
        if self._by_name is None:
            self._by_name = {}
            for path in sorted(self.images_dir.rglob("*")):
                self._by_name.setdefault(path.name, []).append(path)
        found = self._by_name.get(parts[-1], []) if parts else []
        if len(found) == 1:
            return found[0]
        if leaves:
            raise Defect("outside_dataset", f"{file_name!r:.80} leads outside the dataset")
        raise Defect("missing_file", f"missing from {self.images_dir}")


def _add_annotation(
    entry: object, records: dict[int, Record], categories: dict[int, str], report: DatasetReport
) -> None:
    values = entry if isinstance(entry, dict) else {}
    annotation_id, image_id = _as_id(values.get("id")), _as_id(values.get("image_id"))
    record = records.get(image_id)
    file_name = record.file_name if record else "?"
    try:
        if record is None:
            raise Defect("unknown_image", f"belongs to image {values.get('image_id')!r:.40}, which is not usable")
        if values.get("iscrowd") in (1, True, "1"):
            raise Defect("crowd", "a crowd region, not one object")
        rle = segmentation_to_rle(values.get("segmentation"), record.size)
    except Defect as defect:
        report.skip_annotation(defect.code, file_name, image_id, annotation_id, defect.message)
        return
    category_id = _as_id(values.get("category_id"))
    if category_id not in categories:
        report.remark("unknown_category", file_name, f"annotation {annotation_id} has category_id {category_id!r:.40}")
    if annotation_id is None:
        annotation_id = -1 - report.usable_annotation_count
    report.usable_annotation_count += 1
    record.annotations.append(Annotation(annotation_id, category_id or 0, rle["counts"], rle_area(rle), rle_box(rle)))


def _finish(records: dict[int, Record], categories: dict[int, str], report: DatasetReport, part: Part) -> Index:
    _renumber_duplicates(records.values(), report, part)
    report.background_image_count = sum(not record.annotations for record in records.values())
    report.usable_image_count = len(records) - report.background_image_count
    if report.usable_annotation_count == 0:
        raise UserError(
            f"{part.annotation_file}: nothing to train on; {report.summarize()}"
            + "".join(f"\n{line}" for line in report.list_examples())
        )
    return Index(sorted(records.values(), key=lambda record: record.image_id), categories, report)


def _renumber_duplicates(records: Iterator[Record], report: DatasetReport, part: Part) -> None:
    annotations = [annotation for record in records for annotation in record.annotations]
    seen: set[int] = set()
    fresh = max((annotation.id for annotation in annotations), default=0) + 1
    examples = []
    for annotation in annotations:
        if annotation.id in seen or annotation.id < 0:
            examples.append(annotation.id)
            annotation.id, fresh = fresh, fresh + 1
        seen.add(annotation.id)
    if examples:
        report.remark(
            "renumbered",
            part.annotation_file.name,
            f"{len(examples)} annotations had no id or another's and got a new one: {examples[:5]}",
        )


def _as_id(value: object) -> int | None:
    """Return a whole number that may be written as text or as a float; None for anything else."""
    try:
        number = float(value) if isinstance(value, str) else value
        return int(number) if not isinstance(number, bool) and number == int(number) else None
    except (TypeError, ValueError, OverflowError):
        return None
