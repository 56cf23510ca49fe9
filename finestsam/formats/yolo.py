"""Read YOLO's segmentation files: one text file per image, one line per object, corners as shares of width, height."""

import os
from dataclasses import dataclass
from pathlib import Path

from finestsam.config import DatasetConfig
from finestsam.errors import Defect
from finestsam.formats.checked_image import CheckedImage
from finestsam.formats.files import Border
from finestsam.formats.layouts import Part
from finestsam.images.files import IMAGE_SUFFIXES
from finestsam.masks import Remark, segmentation_to_rle
from finestsam.records import DatasetReport
from finestsam.runtime.plain_yaml import parse_yaml

MAX_FILE_BYTES = 256_000_000
MAX_NAMES_BYTES = 1_000_000


@dataclass
class YoloJob:
    """One image and its text file."""

    file_name: str
    path: Path
    labels: Path | None  # None: an image without objects
    border: Border
    settings: DatasetConfig

    def check(self) -> CheckedImage:
        """Read the image and its objects, one per line. An object's id is its line number."""
        image = CheckedImage(self.file_name)
        try:
            lines = self._read_lines()
            image.inspect(self.border.check(self.path), None, self.settings)
        except Defect as defect:
            image.skip(defect)
            return image
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            image.annotation_count += 1
            remarks: list[Remark] = []
            try:
                category, polygon = self._read_line(line, image.size, remarks)
                image.add(number, category, segmentation_to_rle([polygon], image.size, remarks))
                image.remark(remarks, number)
            except Defect as defect:
                image.skip_object(number, defect)
        return image

    def _read_lines(self) -> list[str]:
        if self.labels is None:
            return []
        content = self.border.read_bytes(self.labels, MAX_FILE_BYTES)
        try:
            return content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise Defect("broken_labels", f"{self.labels.name} is not UTF-8 text ({error})") from None

    def _read_line(self, line: str, size: tuple[int, int], remarks: list[Remark]) -> tuple[int, list[float]]:
        """Return the class and the corners [x0, y0, x1, y1, ...] in pixels."""
        try:
            first, *shares = (float(word) for word in line.split())
            category = int(first)
        except (ValueError, OverflowError):
            raise Defect("not_a_number", f"the line holds something that is not a number: {line[:60]!r}") from None
        if len(shares) == 4:
            if not self.settings.masks_from_boxes:
                raise Defect("box_only", "a box, not an outline")
            remarks.append(("mask_from_box", "its box is used as the mask"))
            x, y, width, height = shares  # centre, then size
            left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
            shares = [left, top, right, top, right, bottom, left, bottom]
        height, width = size
        return category, [share * (height if index % 2 else width) for index, share in enumerate(shares)]


def list_jobs(
    part: Part, settings: DatasetConfig, report: DatasetReport
) -> tuple[list[YoloJob], dict[int, str] | None]:
    """Return a job for every image, and the class names if a file has them."""
    jobs, border = [], Border(part, settings)
    for path in sorted(part.images_dir.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            relative = path.relative_to(part.images_dir)
            labels = part.labels / relative.with_suffix(".txt")
            found = labels if os.path.lexists(labels) else None
            jobs.append(YoloJob(relative.as_posix(), path, found, border, settings))
    return jobs, read_names(part, settings, report)


def read_names(part: Part, settings: DatasetConfig, report: DatasetReport | None = None) -> dict[int, str]:
    """Return the class names from data.yaml or classes.txt, in the dataset's folder or beside the labels.

    Args:
        report: receives a remark for each file of names that cannot be read.
    """
    border = Border(part, settings)
    for folder in dict.fromkeys((part.root, part.labels.parent, part.labels)):
        lists = [path for path in (folder / "classes.txt", folder / "obj.names") if os.path.lexists(path)]
        for path in [*sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]), *lists]:
            try:
                content = border.read_bytes(path, MAX_NAMES_BYTES)
                names = _list_names(content) if path in lists else _parse_yaml_names(content)
            except Defect as defect:
                if report:
                    report.remark("names_unread", path.name, f"class names cannot be read from it: {defect.message}")
                continue
            if names:
                return names
    return {}


def _list_names(content: bytes) -> dict[int, str]:
    lines = content.decode("utf-8-sig", errors="replace").splitlines()
    return {number: line.strip() for number, line in enumerate(lines) if line.strip()}


def _parse_yaml_names(content: bytes) -> dict[int, str]:
    content = parse_yaml(content.decode("utf-8-sig", errors="replace"))
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        return {number: str(name) for number, name in enumerate(names)}
    if isinstance(names, dict):
        return {number: str(name) for number, name in names.items() if isinstance(number, int)}
    return {}
