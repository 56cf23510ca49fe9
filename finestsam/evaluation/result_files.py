"""Masks that any program found, from a COCO results file, to be scored like the generator's own."""

import math
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from finestsam.data.categories import number_categories
from finestsam.data.semantic import ClassTable
from finestsam.errors import Defect, UserError, printable
from finestsam.evaluation.coco_scores import Detections
from finestsam.formats.coco import as_id, load_json
from finestsam.masks import encode_mask, segmentation_to_rle
from finestsam.records import Record

# The class of masks of no category of the dataset; they count where categories do not matter.
UNKNOWN = 0


def read_results(
    path: Path, records: Sequence[Record], categories: dict[int, str], task: str = "auto"
) -> tuple[list[Detections], ClassTable | None]:
    """Return the masks of a file for each image, the best score first, and the table of their classes.

    The table is None where the file has no classes: it names a single category, and the dataset has several.

    The file is a list of results as COCO defines them (image_id, segmentation, score), or a dataset with a list of
    images, as `--mode predict` writes it. In a dataset, images are matched by file name, because their ids need not be
    those of the annotations. Categories are matched by name where the file lists them, else by id.

    Args:
        categories: of the annotations, names by id.
        task: masks: categories are ignored; classes: they are needed, and there may be a single one.

    Raises:
        UserError: not such a file, no image of this set, an invalid mask, or no category of the annotations where
            `task` needs them.
    """
    content = load_json(path)
    entries = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{printable(path)}: not a COCO results file, a list of image_id, segmentation and score")
    indices = _index_images(content, records, path)
    table = _find_categories(content, entries, categories, task, path)
    found: list[list[tuple[float, dict, int]]] = [[] for _ in records]
    left_out = 0
    for number, entry in enumerate(entries):
        index = indices.get(_read_id(entry, "image_id", f"result {number}", path, takes_text=isinstance(content, dict)))
        if index is None:
            left_out += 1  # an image of another part of the dataset
            continue
        score = entry.get("score", 1.0)
        try:
            if not _is_score(score):
                raise Defect("score", f"its score is {score!r:.40}")
            rle = segmentation_to_rle(entry.get("segmentation"), records[index].size)
        except Defect as defect:
            if defect.code != "empty_mask":
                raise UserError(f"{printable(path)}: result {number}: {defect.message}") from None
            rle = encode_mask(np.zeros(records[index].size, dtype=bool))  # an empty mask counts as a wrong one
        category_id = as_id(entry.get("category_id"))
        is_known = table is not None and category_id is not None
        found[index].append((float(score), rle, table.by_category.get(category_id, UNKNOWN) if is_known else UNKNOWN))
    if not any(found) and entries:
        raise UserError(f"{printable(path)}: none of its {len(entries)} results is of an image of this set")
    if left_out:
        print(f"{printable(path)}: {left_out} of {len(entries)} results are of other images than these, left out")
    detections = []
    for masks in found:
        masks.sort(key=lambda entry: -entry[0])
        scores, rles, numbers = map(list, zip(*masks, strict=True)) if masks else ([], [], [])
        detections.append(Detections(rles, scores, numbers if table else None))
    return detections, number_categories(categories, table.names[1:]) if table else None


def _find_categories(
    content: Any, entries: list[dict], categories: dict[int, str], task: str, path: Path
) -> ClassTable | None:
    """Return the table of the results' classes, by the file's category ids; None where it has no classes."""
    if task == "masks":
        return None
    listed = content.get("categories") if isinstance(content, dict) else None
    own = categories
    if isinstance(listed, list):
        own = {
            _read_id(entry, "id", f"category {number}", path): str(entry.get("name"))
            for number, entry in enumerate(listed)
        }
    used = {
        _read_id(entry, "category_id", f"result {number}", path)
        for number, entry in enumerate(entries)
        if entry.get("category_id") is not None
    }
    is_known = any(own.get(number) in categories.values() for number in used)
    knows_several = len(used) > 1 or len(categories) == 1 or own is not categories and len(own) > 1
    if is_known and (knows_several or task == "classes"):
        return number_categories(own, number_categories(categories).names[1:])
    if task == "classes":
        names = ", ".join(map(printable, list(categories.values())[:10]))
        raise UserError(f"{printable(path)}: none of its categories is one of the dataset ({names})")
    return None


def _index_images(content: Any, records: Sequence[Record], path: Path) -> dict[int | str, int]:
    """Return the index of each image of the set by its id in the file."""
    if not isinstance(content, dict):
        return {record.image_id: index for index, record in enumerate(records)}
    images = content.get("images")
    if not isinstance(images, list):
        raise UserError(f"{printable(path)}: has annotations and no list of images")
    by_name: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        by_name.setdefault(PurePosixPath(record.file_name).name, []).append(index)
    # For each image of the set the file's entries that may be it: number of common path parts, name, id.
    claims: dict[int, list[tuple[int, str, Any]]] = {}
    for number, image in enumerate(images):
        image_id = _read_id(image, "id", f"image {number}", path, takes_text=True)
        name = str(image.get("file_name"))
        candidates = by_name.get(PurePosixPath(name).name, [])
        common = [_count_common_parts(name, records[index].path) for index in candidates]
        if common and common.count(max(common)) > 1:
            raise UserError(f"{printable(path)}: several images of this set are called {printable(name)}")
        if common:
            claims.setdefault(candidates[common.index(max(common))], []).append((max(common), name, image_id))
    indices: dict[int | str, int] = {}
    for index, entries in claims.items():
        most = max(common for common, _, _ in entries)
        names = sorted({name for common, name, _ in entries if common == most})
        if len(names) > 1:
            shown = printable(records[index].file_name)
            raise UserError(f"{printable(path)}: {' and '.join(map(printable, names[:2]))} may both be {shown}")
        for image_id in (image_id for common, _, image_id in entries if common == most):
            if indices.setdefault(image_id, index) != index:
                raise UserError(f"{printable(path)}: image id {image_id!r:.40} stands for several images")
    return indices


def _read_id(entry: Any, key: str, name: str, path: Path, takes_text: bool = False) -> int | str:
    """Return an id: a whole number, written as a number or as text.

    Args:
        name: of the entry, for the message.
        takes_text: accept any text, because the file itself holds both ends of the reference.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    number = as_id(value)
    if number is not None:
        return number
    if takes_text and isinstance(value, str):
        return value
    raise UserError(f"{printable(path)}: {name}: its {key} is {printable(repr(value)):.40}, expected a whole number")


def _is_score(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond 10^308
        return False


def _count_common_parts(name: str, path: Path) -> int:
    """Return how many parts two paths have in common, counted from their ends."""
    parts = zip(reversed(PurePosixPath(name).parts), reversed(path.parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))
