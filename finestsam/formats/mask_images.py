"""Read images with masks stored as image files of the same names."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finestsam.config import DatasetConfig
from finestsam.errors import Defect
from finestsam.formats.checked_image import CheckedImage
from finestsam.formats.files import Border
from finestsam.formats.layouts import Part
from finestsam.images.files import IMAGE_SUFFIXES, find_pixel_kind, read_labels
from finestsam.masks import encode_mask, find_components, labels_to_rles, rle_area
from finestsam.records import DatasetReport

# Endings that tools append to an image's name to name its mask.
MASK_ENDING = re.compile(r"[-_. ]?(mask|masks|label|labels|seg|segmentation|gt|annotation)$", re.IGNORECASE)
# Value of undecided pixels along borders, in PASCAL VOC's palette images and in 8-bit grey class maps. Not an object.
VOID = 255
# A mask has numbered objects if this share of its middle grey pixels is the corner of 2 x 2 equal pixels.
MIN_FLAT_SHARE = 0.25


@dataclass
class MaskPairJob:
    """One image and its mask, or several masks with one object each."""

    file_name: str
    path: Path
    masks: list[Path]
    border: Border
    settings: DatasetConfig

    def check(self) -> CheckedImage:
        """Read the image and the objects of its masks."""
        image = CheckedImage(self.file_name)
        try:
            if not self.masks:
                raise Defect("missing_mask", "no mask of this name; an image without objects needs an empty mask")
            labels, is_lossy = read_labels(self.border.check(self.masks[0]), self.settings.images)
            image.inspect(self.border.check(self.path), labels.shape, self.settings)
        except Defect as defect:
            image.skip(defect)
            return image
        if len(self.masks) > 1:
            self._add_files(image)
        else:
            self._add_objects(image, labels, is_lossy)
        return image

    def _add_files(self, image: CheckedImage) -> None:
        for path in self.masks:
            image.annotation_count += 1
            try:
                labels, _ = read_labels(self.border.check(path), self.settings.images)
                if labels.shape != image.size:
                    height, width = labels.shape
                    raise Defect("size_mismatch", f"size mismatch: the mask has {width} x {height} pixels")
                image.add(path.stem, None, encode_mask(_find_foreground(labels)))
            except Defect as defect:
                image.skip_object(path.stem, defect)

    def _add_objects(self, image: CheckedImage, labels: np.ndarray, is_lossy: bool) -> None:
        instances = self.settings.mask_instances
        if instances == "auto":
            instances = "components" if is_lossy or not _holds_numbers(labels) else "values"
        if instances == "components":
            _, labels = find_components(_find_foreground(labels))
        elif (
            (labels == VOID).any()
            and len(np.unique(labels[labels != VOID])) > 1
            and find_pixel_kind(self.masks[0], self.settings.images)
            in (("palette", "grey") if instances == "classes" else ("palette",))
        ):
            if instances == "classes":
                image.add_crowd(encode_mask(labels == VOID))
            labels = np.where(labels == VOID, 0, labels)
        specks = 0
        for number, rle in labels_to_rles(labels).items():
            if rle_area(rle) < self.settings.min_region_pixels:
                specks += 1
                continue
            image.annotation_count += 1
            image.add(number, number if instances == "classes" else None, rle)
        if specks:
            limit = self.settings.min_region_pixels
            image.remark([("specks", f"{specks} regions under {limit} pixels dropped (dataset.min_region_pixels)")])


def list_jobs(
    part: Part, settings: DatasetConfig, report: DatasetReport
) -> tuple[list[MaskPairJob], dict[int, str] | None]:
    """Return a job for every image, and no categories: objects have none, or their grey value."""
    masks: dict[str, list[Path]] = {}
    for path in sorted(part.labels.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            relative = path.relative_to(part.labels)
            for name in {_fold(relative), _fold(relative.with_name(MASK_ENDING.sub("", path.stem) + ".x"))}:
                masks.setdefault(name, []).append(path)
            if len(relative.parts) > 1:  # a folder with one mask per object
                masks.setdefault(f"{_fold(relative.parent / 'x')[:-2]}/", []).append(path)
    jobs, border = [], Border(part, settings)
    for path in sorted(part.images_dir.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        relative = path.relative_to(part.images_dir)
        found = masks.get(_fold(relative), [])[:1] or masks.get(f"{_fold(relative)}/", [])
        jobs.append(MaskPairJob(relative.as_posix(), path, found, border, settings))
    return jobs, None


def _fold(relative: Path) -> str:
    return relative.with_suffix("").as_posix().casefold()


def _find_foreground(labels: np.ndarray) -> np.ndarray:
    """Return the pixels brighter than half of the brightest, H x W, bool. In a mask of 0 and 1 these are the ones."""
    brightest = int(labels.max(initial=0))
    return labels > (127 if 1 < brightest < 256 and brightest > 127 else brightest // 2)


def _holds_numbers(labels: np.ndarray) -> bool:
    """Return whether the middle values are object numbers, not the smoothed edges of a black and white mask.

    A smoothed edge is one or two pixels wide, so few of its 2 x 2 blocks are equal. Objects consist of equal blocks.
    """
    brightest = labels.max(initial=0)
    is_between = (labels > 0) & (labels < brightest)
    if not is_between.any():
        return False
    corner = labels[:-1, :-1]
    is_flat = (corner == labels[1:, :-1]) & (corner == labels[:-1, 1:]) & (corner == labels[1:, 1:])
    return brightest != 255 or (is_flat & is_between[:-1, :-1]).sum() > MIN_FLAT_SHARE * is_between.sum()
