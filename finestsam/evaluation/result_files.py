"""Masks that any program found, from a COCO results file, to be scored like the generator's own."""

import math
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from finestsam.data.categories import number_categories
from finestsam.data.coco import load_json
from finestsam.data.index import Record
from finestsam.data.semantic import ClassTable
from finestsam.errors import Defect, UserError, printable
from finestsam.evaluation.coco_scores import Detections
from finestsam.masks import encode_mask, segmentation_to_rle

# The class of what is of no category of the dataset: it counts where categories do not.
UNKNOWN = 0


def read_results(
    path: Path, records: Sequence[Record], categories: dict[int, str], task: str = "auto"
) -> tuple[list[Detections], ClassTable | None]:
    """Return what the file says was found in each picture, the best score first, and the classes of it.

    Classes are None where the file knows none: where it names a single category, and the dataset has others.

    The file is a list of results as COCO defines them (image_id, segmentation, score), or a dataset that lists its
    images too, as `--mode predict` writes it: then pictures are known by their file names, since their ids need not be
    those of the labels. Likewise categories, which are those of its own list where it has one, known by their names,
    and else have the ids of the labels.

    Args:
        categories: of the labels, names by id.
        task: masks: categories are not asked for; classes: they are, and may be a single one.

    Raises:
        UserError: not such a file, a picture that is not of this set, a mask that is none, or categories that are asked
            for and are none of the labels'.
    """
    content = load_json(path)
    entries = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{printable(path)}: not a COCO results file, a list of image_id, segmentation and score")
    places = _find_places(content, records, path)
    table = _find_categories(content, entries, categories, task, path)
    found: list[list[tuple[float, dict, int]]] = [[] for _ in records]
    for number, entry in enumerate(entries):
        place = places.get(entry.get("image_id"))
        if place is None:
            continue  # of another part of the dataset
        score = entry.get("score", 1.0)
        try:
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise Defect("score", f"its score is {score!r:.40}")
            rle = segmentation_to_rle(entry.get("segmentation"), records[place].size)
        except Defect as defect:
            if defect.code != "empty_mask":
                raise UserError(f"{printable(path)}: result {number}: {defect.message}") from None
            rle = encode_mask(np.zeros(records[place].size, dtype=bool))  # found, and wrong
        category_id = entry.get("category_id")
        is_known = table is not None and isinstance(category_id, int)
        number = table.by_category.get(category_id, UNKNOWN) if is_known else UNKNOWN
        found[place].append((float(score), rle, number))
    if not any(found) and entries:
        raise UserError(f"{printable(path)}: none of its {len(entries)} results is of a picture of this set")
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
        entries_with_id = [one for one in listed if isinstance(one, dict) and isinstance(one.get("id"), int)]
        own = {one["id"]: str(one.get("name")) for one in entries_with_id}
    used = {entry["category_id"] for entry in entries if isinstance(entry.get("category_id"), int)}
    is_known = any(own.get(number) in categories.values() for number in used)
    knows_several = len(used) > 1 or len(categories) == 1 or own is not categories and len(own) > 1
    if is_known and (knows_several or task == "classes"):
        return number_categories(own, number_categories(categories).names[1:])
    if task == "classes":
        names = ", ".join(map(printable, list(categories.values())[:10]))
        raise UserError(f"{printable(path)}: none of its categories is one of the dataset ({names})")
    return None


def _find_places(content: Any, records: Sequence[Record], path: Path) -> dict[Any, int]:
    """Return the place of each picture of the set by the id that the file has for it."""
    if not isinstance(content, dict):
        return {record.image_id: place for place, record in enumerate(records)}
    images = content.get("images")
    if not isinstance(images, list):
        raise UserError(f"{printable(path)}: has annotations and no list of images")
    by_name: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        by_name.setdefault(PurePosixPath(record.file_name).name, []).append(place)
    claims: dict[int, list[tuple[int, str, Any]]] = {}  # of a picture: the entries that may be it, by what they share
    for image in images:
        name = str(image.get("file_name")) if isinstance(image, dict) else ""
        candidates = by_name.get(PurePosixPath(name).name, [])
        common = [_count_common_parts(name, records[place].path) for place in candidates]
        if common and common.count(max(common)) > 1:
            raise UserError(f"{printable(path)}: several pictures of this set are called {printable(name)}")
        if common:
            claims.setdefault(candidates[common.index(max(common))], []).append((max(common), name, image.get("id")))
    places = {}
    for place, entries in claims.items():
        most = max(common for common, _, _ in entries)
        names = sorted({name for common, name, _ in entries if common == most})
        if len(names) > 1:
            told = printable(records[place].file_name)
            raise UserError(f"{printable(path)}: {' and '.join(map(printable, names[:2]))} may both be {told}")
        places |= {image_id: place for common, _, image_id in entries if common == most}
    return places


def _count_common_parts(name: str, path: Path) -> int:
    """Return how many parts of two paths are the same, from their ends."""
    parts = zip(reversed(PurePosixPath(name).parts), reversed(path.parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))
