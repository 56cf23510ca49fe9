"""Read COCO annotations: the annotations of the file are grouped by image, and every image becomes a job."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from finestsam.config import DatasetConfig
from finestsam.errors import Defect, UserError
from finestsam.formats.checked_image import CheckedImage, as_source_id
from finestsam.formats.files import Border, FileFinder
from finestsam.formats.layouts import Part
from finestsam.masks import Remark, box_iou, rle_box, segmentation_to_rle
from finestsam.records import UNNAMED_CATEGORY, DatasetReport

# A box in the file whose IoU with the mask's box is smaller gets a remark.
MIN_BOX_IOU = 0.5


@dataclass(slots=True)
class Entry:
    """One annotation, as in the file."""

    source_id: object
    category_id: int | None
    is_crowd: bool
    segmentation: object
    bbox: object


@dataclass
class CocoJob:
    """One image of an annotation file."""

    image_id: int
    file_name: str
    expected_size: tuple[int | None, int | None]  # height, width in the file; None: missing
    path: Path | Defect
    remarks: list[Remark]
    settings: DatasetConfig
    entries: list[Entry] = field(default_factory=list)

    def check(self) -> CheckedImage:
        """Read the image and decode the masks of its annotations."""
        image = CheckedImage(self.file_name, self.image_id, annotation_count=len(self.entries))
        image.remark(self.remarks)
        try:
            if isinstance(self.path, Defect):
                raise self.path
            self._inspect(image, self.path)
        except Defect as defect:
            image.skip(defect)
            unusable = Defect("image_skipped", "its image cannot be used")
            for entry in self.entries:
                image.skip_object(entry.source_id, unusable)
            return image
        for entry in self.entries:
            try:
                self._add(image, entry)
            except Defect as defect:
                image.skip_object(entry.source_id, defect)
        return image

    def _inspect(self, image: CheckedImage, path: Path) -> None:
        height, width = self.expected_size
        if height and width:
            image.inspect(path, (height, width), self.settings)
        else:
            image.inspect(path, None, self.settings)
            image.remark([("no_size", "the annotations do not give its width and height; the image file does")])

    def _add(self, image: CheckedImage, entry: Entry) -> None:
        segmentation, remarks = entry.segmentation, []
        if _is_empty(segmentation) and _is_box(entry.bbox):
            if not self.settings.masks_from_boxes:
                raise Defect("empty_segmentation", "empty segmentation, only a box")
            segmentation = [_box_to_polygon(entry.bbox)]
            remarks.append(("mask_from_box", "its box is used as the mask"))
        rle = segmentation_to_rle(segmentation, image.size, remarks)
        if entry.is_crowd and not self.settings.include_crowd:
            image.add_crowd(rle, entry.category_id)
            raise Defect("crowd", "a crowd region, not one object")
        image.add(entry.source_id, entry.category_id, rle)
        image.remark(remarks + _compare_box(entry.bbox, rle_box(rle)), entry.source_id)


def list_jobs(part: Part, settings: DatasetConfig, report: DatasetReport) -> tuple[list[CocoJob], dict[int, str]]:
    """Return a job for every image of an annotation file, and its categories.

    Args:
        report: receives the findings that belong to no single image.

    Raises:
        UserError: the file cannot be read as COCO annotations.
    """
    _refuse_link_outside(part, settings)
    content = load_json(part.labels)
    _check_structure(content, part.labels)
    categories = _read_categories(content, part, report)
    jobs = _list_images(content["images"], part, settings, report)
    for entry in content["annotations"]:
        _assign_to_image(entry, jobs, report)
    return list(jobs.values()), categories


def _refuse_link_outside(part: Part, settings: DatasetConfig) -> None:
    if settings.path and part.labels == Path(settings.path):
        return  # the user gave this path, link or not
    try:
        Border(part, settings).check(part.labels)
    except Defect as defect:
        allowed = "to open it, use --dataset.follow_symlinks or give its path as --dataset"
        raise UserError(f"{part.labels}: {defect.message}; {allowed}") from None


def load_json(path: Path) -> object:
    """Parse a json file, with or without a byte-order mark."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise UserError(f"{path}: not a regular file")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise UserError(_describe_too_long(path)) from None


def parse_json(content: bytes, path: Path) -> object:
    """Return the parsed content of a json file."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be annotations") from None
    except ValueError as error:  # not UTF-8, or an integer of thousands of digits
        raise UserError(f"{path}: not JSON: {error}") from None
    except MemoryError:
        raise UserError(_describe_too_long(path)) from None


def _describe_too_long(path: Path) -> str:
    return f"{path}: out of memory: the file has {path.stat().st_size:,} bytes"


def _check_structure(content: object, path: Path) -> None:
    if isinstance(content, list):
        is_results = content and isinstance(content[0], dict) and "image_id" in content[0]
        hint = "; this looks like a list of COCO results, without images" if is_results else ""
        raise UserError(f"{path}: expected an object with images, annotations and categories, got a list{hint}")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object with images, annotations and categories, got {content!r:.40}")
    if "shapes" in content:
        raise UserError(
            f"{path}: this is labelme's format, with one file per image: give the folder of these files, and keep no "
            "file called annotations.json in it"
        )
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise UserError(f"{path}: `{key}` is missing, or not a list")


def _read_categories(content: dict, part: Part, report: DatasetReport) -> dict[int, str]:
    entries = content.get("categories")
    if not isinstance(entries, list) or not entries:
        report.remark("no_categories", part.labels.name, f"no categories; every object is `{UNNAMED_CATEGORY}`")
        return {}
    categories = {
        as_id(entry.get("id")): str(entry.get("name", UNNAMED_CATEGORY)) for entry in entries if isinstance(entry, dict)
    }
    categories.pop(None, None)
    return categories


def _list_images(entries: list, part: Part, settings: DatasetConfig, report: DatasetReport) -> dict[int, CocoJob]:
    """Return the jobs by image id; an entry without an id is reported."""
    jobs: dict[int, CocoJob] = {}
    find_file = FileFinder(part, settings)
    for entry in entries:
        values = entry if isinstance(entry, dict) else {}
        image_id, file_name = as_id(values.get("id")), values.get("file_name")
        name = file_name if isinstance(file_name, str) else "?"
        if image_id is None:
            report.image_count += 1
            report.skip_image("no_image_id", name, "an image without an id")
            continue
        known = jobs.get(image_id)
        if known is None:
            jobs[image_id] = _make_job(values, image_id, name, find_file, settings)
        elif known.file_name != name:
            raise UserError(f"{part.labels}: two images have the id {image_id}: {known.file_name!r} and {name!r}")
        else:
            report.remark("listed_twice", name, f"listed twice with image id {image_id}, used once")
    names: dict[str, int] = {}
    for job in jobs.values():
        if names.setdefault(job.file_name, job.image_id) != job.image_id:
            report.remark(
                "file_listed_twice",
                job.file_name,
                f"has the image ids {names[job.file_name]} and {job.image_id}; both stay in the same split",
            )
    return jobs


def _make_job(values: dict, image_id: int, name: str, find_file: FileFinder, settings: DatasetConfig) -> CocoJob:
    size = (as_id(values.get("height")), as_id(values.get("width")))
    path, remarks = None, []
    try:
        if not isinstance(values.get("file_name"), str) or not name:
            if values.get("coco_url"):
                raise Defect("not_downloaded", "has a coco_url but no file_name: not downloaded")
            raise Defect("no_file_name", "an image without a file name")
        path, remarks = find_file(name)
    except Defect as defect:
        path = defect
    return CocoJob(image_id, name, size, path, remarks, settings)


def _assign_to_image(entry: object, jobs: dict[int, CocoJob], report: DatasetReport) -> None:
    values = entry if isinstance(entry, dict) else {}
    job = jobs.get(as_id(values.get("image_id")))
    if job is None:
        report.annotation_count += 1
        message = f"belongs to image {values.get('image_id')!r:.40}, which is not listed"
        report.skip_annotation("unknown_image", "?", as_source_id(values.get("id")), message)
        return
    is_crowd = as_id(values.get("iscrowd")) == 1 or values.get("iscrowd") is True
    category_id = as_id(values.get("category_id"))
    job.entries.append(Entry(values.get("id"), category_id, is_crowd, values.get("segmentation"), values.get("bbox")))


def _is_empty(segmentation: object) -> bool:
    return segmentation is None or segmentation in ([], [[]], {}, "")


def _is_box(bbox: object) -> bool:
    """Return whether a bbox is [x, y, width, height] with finite numbers and a positive area."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return False
    is_number = all(isinstance(side, int | float) and abs(side) < 1e9 for side in bbox)  # False for NaN
    return is_number and bbox[2] > 0 and bbox[3] > 0


def _box_to_polygon(bbox: list[float]) -> list[float]:
    x, y, width, height = bbox
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _compare_box(bbox: object, box: list[int]) -> list[Remark]:
    if bbox is None:
        return []
    if not _is_box(bbox):
        return [("bad_bbox", f"bbox {bbox!s:.60} is not a box; the box of the mask is used")]
    if box_iou(bbox, box) < MIN_BOX_IOU:
        return [("bbox_disagrees", f"bbox {bbox!s:.60} overlaps the mask's box {box} by less than half")]
    return []


def as_id(value: object) -> int | None:
    """Return a whole number, also from text or a float; None for anything else."""
    try:
        number = float(value) if isinstance(value, str) and not value.strip().lstrip("-").isdigit() else value
        number = int(number) if isinstance(number, str) else number
        return int(number) if not isinstance(number, bool) and number == int(number) else None
    except (TypeError, ValueError, OverflowError):
        return None
