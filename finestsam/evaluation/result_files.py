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

# The class of what is of no category of the dataset: it counts where categories do not.
UNKNOWN = 0


def read_results(
    path: Path, records: Sequence[Record], categories: dict[int, str], task: str = "auto"
) -> tuple[list[Detections], ClassTable | None]:
    """Return what the file says was found in each image, the best score first, and the classes of it.

    Classes are None where the file knows none: where it names a single category, and the dataset has others.

    The file is a list of results as COCO defines them (image_id, segmentation, score), or a dataset that lists its
    images too, as `--mode predict` writes it: then images are known by their file names, since their ids need not be
    those of the labels. Likewise categories, which are those of its own list where it has one, known by their names,
    and else have the ids of the labels.

    Args:
        categories: of the labels, names by id.
        task: masks: categories do not count; classes: they do, and may be a single one.

    Raises:
        UserError: not such a file, an image that is not of this set, a mask that is none, or categories that are asked
            for and are none of the labels'.
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
            left_out += 1  # of another part of the dataset
            continue
        score = entry.get("score", 1.0)
        try:
            if not _is_score(score):
                raise Defect("score", f"its score is {score!r:.40}")
            rle = segmentation_to_rle(entry.get("segmentation"), records[index].size)
        except Defect as defect:
            if defect.code != "empty_mask":
                raise UserError(f"{printable(path)}: result {number}: {defect.message}") from None
            rle = encode_mask(np.zeros(records[index].size, dtype=bool))  # found, and wrong
        category_id = as_id(entry.get("category_id"))
        is_known = table is not None and category_id is not None
        found[index].append((float(score), rle, table.by_category.get(category_id, UNKNOWN) if is_known else UNKNOWN))
    if not any(found) and entries:
        raise UserError(f"{printable(path)}: none of its {len(entries)} results is of an image of this set")
    if left_out:
        print(f"{printable(path)}: {left_out} of {len(entries)} results are of other images than these, left out")
    detections = []
    for one in found:
        one.sort(key=lambda entry: -entry[0])
        scores, rles, numbers = map(list, zip(*one, strict=True)) if one else ([], [], [])
        detections.append(Detections(rles, scores, numbers if table else None))
    return detections, number_categories(categories, table.names[1:]) if table else None


def _find_categories(
    content: Any, entries: list[dict], categories: dict[int, str], task: str, path: Path
) -> ClassTable | None:
    """Return the classes of results, by the ids that the file has for them; None where it knows none."""
    if task == "masks":
        return None
    listed = content.get("categories") if isinstance(content, dict) else None
    own = categories
    if isinstance(listed, list):
        own = {
            _read_id(one, "id", f"category {number}", path): str(one.get("name")) for number, one in enumerate(listed)
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
    """Return the index of each image of the set by the id that the file has for it."""
    if not isinstance(content, dict):
        return {record.image_id: index for index, record in enumerate(records)}
    images = content.get("images")
    if not isinstance(images, list):
        raise UserError(f"{printable(path)}: has annotations and no list of images")
    by_name: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        by_name.setdefault(PurePosixPath(record.file_name).name, []).append(index)
    claims: dict[int, list[tuple[int, str, Any]]] = {}  # of an image: the entries that may be it, by what they share
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
    """Return an id, a whole number however it is written.

    Args:
        name: of the entry, for the message.
        takes_text: where both ends of a reference stand in the file, they may be any text.
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
    """Return how many parts of two paths are the same, from their ends."""
    parts = zip(reversed(PurePosixPath(name).parts), reversed(path.parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))
