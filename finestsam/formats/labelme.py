"""Read labelme's files: one json per image, beside it or in `annotations/`. It can contain the image itself."""

import base64
import binascii
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finestsam.config import DatasetConfig
from finestsam.errors import Defect, UserError
from finestsam.formats.checked_image import CheckedImage
from finestsam.formats.coco import parse_json
from finestsam.formats.files import FileFinder
from finestsam.formats.layouts import Part
from finestsam.images.files import IMAGE_SUFFIXES, decode_image
from finestsam.masks import Remark, encode_mask, join_rles, rle_area, segmentation_to_rle
from finestsam.records import DatasetReport
from finestsam.runtime.folders import cache_folder
from finestsam.runtime.whole_files import write_bytes

# No file of labels is larger, even with its image inside.
MAX_FILE_BYTES = 512_000_000
NO_AREA = {"line", "linestrip", "point", "points"}
CIRCLE_CORNERS = 180


@dataclass
class LabelmeJob:
    """One json file, or one image without a json file."""

    file_name: str
    labels: Path | None  # None: an image without objects
    same_name_image: Path | None  # the image with the json file's name; None: there is none
    find_file: FileFinder
    settings: DatasetConfig

    def check(self) -> CheckedImage:
        """Read the json file, its image, and the masks of its shapes."""
        image = CheckedImage(self.file_name)
        try:
            content = self._load()
            path = self._find_image(content, image)
            image.inspect(path, _read_size(content), self.settings)
        except Defect as defect:
            image.skip(defect)
            return image
        for source_id, label, shapes in _group_shapes(content.get("shapes") or []):
            image.annotation_count += 1
            remarks: list[Remark] = []
            try:
                image.add(source_id, label, _join_shapes(shapes, image.size, remarks))
                image.remark(remarks, source_id)
            except Defect as defect:
                image.skip_object(source_id, defect)
        return image

    def _load(self) -> dict:
        if self.labels is None:
            return {}
        try:
            content = parse_json(self.find_file.border.read_bytes(self.labels, MAX_FILE_BYTES), self.labels)
        except UserError as error:
            raise Defect("broken_labels", str(error)) from None
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise Defect("no_shapes", f"{self.labels.name} has no list of shapes, so it is not a labelme file")
        return content

    def _find_image(self, content: dict, image: CheckedImage) -> Path:
        """Return the image named in the json file, else the one of the same name, else the one inside the file."""
        name = content.get("imagePath")
        if isinstance(name, str) and name:
            try:
                path, _ = self.find_file(name)
                image.file_name = path.relative_to(self.find_file.images_dir).as_posix()
                return path
            except Defect as defect:
                if self.same_name_image is None and not content.get("imageData"):
                    raise defect
        if self.same_name_image is not None:
            return self.find_file.border.check(self.same_name_image)
        data = content.get("imageData")
        if not isinstance(data, str) or not data:
            raise Defect("missing_file", f"no image for {self.file_name}, and no image inside the json file")
        return _extract_image(data, self.settings)


def list_jobs(
    part: Part, settings: DatasetConfig, report: DatasetReport
) -> tuple[list[LabelmeJob], dict[int, str] | None]:
    """Return a job for every json file and every image without one, and no categories: the objects have names."""
    find_file = FileFinder(part, settings)
    images = {path.stem: path for path in sorted(part.images_dir.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    files = [path for path in sorted(part.labels.glob("*.json")) if not _is_export(path)]
    jobs = []
    for labels in files:
        image = images.get(labels.stem)
        jobs.append(LabelmeJob(image.name if image else labels.stem, labels, image, find_file, settings))
    if all(job.same_name_image for job in jobs):  # else a json file of another name may label the image
        labelled = {path.stem for path in files}
        jobs += [
            LabelmeJob(path.name, None, path, find_file, settings)
            for stem, path in images.items()
            if stem not in labelled
        ]
    return sorted(jobs, key=lambda job: job.file_name), None


def _is_export(path: Path) -> bool:
    """Return whether a json file is a conversion of the labelme files beside it."""
    return path.stem in ("annotations", "_annotations.coco", "reference_coco")


def _read_size(content: dict) -> tuple[int, int] | None:
    size = (content.get("imageHeight"), content.get("imageWidth"))
    return size if all(isinstance(side, int) and side > 0 for side in size) else None


def _group_shapes(shapes: list) -> Iterator[tuple[int, str, list[dict]]]:
    """Yield, for each object, the index of its first shape, its label and its shapes.

    Shapes with the same label and group_id are one object.
    """
    groups: dict[object, tuple[int, str, list[dict]]] = {}
    for index, shape in enumerate(shapes):
        values = shape if isinstance(shape, dict) else {}
        label, group_id = str(values.get("label") or "object"), values.get("group_id")
        key = (label, group_id) if isinstance(group_id, int | str) else index
        groups.setdefault(key, (index, label, []))[2].append(values)
    yield from groups.values()


def _join_shapes(shapes: list[dict], size: tuple[int, int], remarks: list[Remark]) -> dict:
    """Return the union of an object's shapes. Invalid shapes are left out, unless all are invalid."""
    rles, defects = [], []
    for shape in shapes:
        try:
            rles.append(_shape_to_rle(shape, size, remarks))
        except Defect as defect:
            defects.append(defect)
    if not rles:
        raise defects[0]
    remarks += [("part_dropped", f"a part left out: {defect.message}") for defect in defects]
    return join_rles(rles)


def _shape_to_rle(shape: dict, size: tuple[int, int], remarks: list[Remark]) -> dict:
    kind = shape.get("shape_type") or "polygon"  # old versions of labelme have only polygons and no shape_type
    if kind in NO_AREA:
        raise Defect("no_area", f"a {kind} has no area")
    points = _read_points(shape)
    if kind == "mask":
        return _paste_mask(shape, points, size)
    if kind == "polygon":
        corners = points
    elif kind == "rectangle" and len(points) >= 2:
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    elif kind == "circle" and len(points) == 2:
        angles = np.linspace(0, 2 * np.pi, CIRCLE_CORNERS, endpoint=False)
        radius = math.dist(*points)
        corners = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        raise Defect("unknown_shape", f"shape_type {str(kind)[:40]!r} with {len(points)} points")
    return segmentation_to_rle([corners.ravel().tolist()], size, remarks)


def _read_points(shape: dict) -> np.ndarray:
    try:
        points = np.array(shape.get("points"), dtype=float).reshape(-1, 2)
    except (TypeError, ValueError):
        raise Defect("not_a_number", f"points are not pairs of numbers: {str(shape.get('points'))[:60]}") from None
    except OverflowError:  # an integer beyond 10^308
        raise Defect("far_outside", f"a point lies beyond any image: {str(shape.get('points'))[:60]}") from None
    if len(points) == 0:
        raise Defect("empty_segmentation", "a shape without points")
    if not np.isfinite(points).all():
        raise Defect("not_finite", "a shape has a coordinate that is not finite")
    return points


def _paste_mask(shape: dict, points: np.ndarray, size: tuple[int, int]) -> dict:
    """Return the mask of a shape that stores the pixels of its box; the first point is the box's corner."""
    pixels = decode_image(_decode_base64(shape.get("mask")))[..., 0] > 0
    x, y = (int(round(side)) for side in points.min(axis=0).clip(-1e6, 1e6))
    mask = np.zeros(size, dtype=bool)
    inside = pixels[max(0, -y) : max(0, size[0] - y), max(0, -x) : max(0, size[1] - x)]
    top, left = max(0, y), max(0, x)
    mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    rle = encode_mask(mask)
    if rle_area(rle) == 0:
        raise Defect("empty_mask", "the mask has no pixel inside the image")
    return rle


def _extract_image(data: str, settings: DatasetConfig) -> Path:
    """Write the image inside a json file to the user's cache folder, named by the hash of its bytes."""
    content = _decode_base64(data)
    decode_image(content, settings=settings.images)  # raises if it is not an image
    path = cache_folder() / "images" / hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        if not path.is_file() or path.read_bytes() != content:  # missing or changed
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
    except OSError as error:
        raise Defect("unreadable", f"cannot write the image inside to {path.parent}: {error.strerror}") from None
    return path


def _decode_base64(text: object) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise Defect("broken_base64", "the pixels are not valid base64") from None
