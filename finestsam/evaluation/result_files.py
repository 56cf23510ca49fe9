"""Masks that any program found, from a COCO results file, to be scored like the generator's own."""

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from finestsam.data.coco import load_json
from finestsam.data.index import Record
from finestsam.errors import Defect, UserError, printable
from finestsam.evaluation.coco_scores import Detections
from finestsam.masks import segmentation_to_rle


def read_results(path: Path, records: Sequence[Record]) -> list[Detections]:
    """Return what the file says was found in each picture, the best score first.

    The file is a list of results as COCO defines them (image_id, segmentation, score), or a dataset that lists its
    images too, as `--mode predict` writes it: then pictures are known by their file names, since their ids need not be
    those of the labels.

    Raises:
        UserError: not such a file, a picture that is not of this set, or a mask that is none.
    """
    content = load_json(path)
    entries = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{printable(path)}: not a COCO results file, a list of image_id, segmentation and score")
    places = _find_places(content, records, path)
    found: list[list[tuple[float, dict]]] = [[] for _ in records]
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
            raise UserError(f"{printable(path)}: result {number}: {defect.message}") from None
        found[place].append((float(score), rle))
    if not any(found) and entries:
        raise UserError(f"{printable(path)}: none of its {len(entries)} results is of a picture of this set")
    detections = []
    for one in found:
        one.sort(key=lambda pair: -pair[0])
        detections.append(Detections([rle for _, rle in one], [score for score, _ in one]))
    return detections


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
    places = {}
    for image in images:
        name = image.get("file_name") if isinstance(image, dict) else None
        candidates = by_name.get(PurePosixPath(str(name)).name, [])
        whole = [place for place in candidates if records[place].file_name == name]
        if len(whole or candidates) == 1:
            places[image.get("id")] = (whole or candidates)[0]
        elif candidates:
            raise UserError(f"{printable(path)}: several pictures of this set are called {printable(str(name))}")
    return places
