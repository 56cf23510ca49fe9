"""Split pictures into training and validation: the same split for the same seed and pictures, in any order."""

import random

from finestsam.data.index import Record
from finestsam.errors import UserError


def split_records(records: list[Record], val_size: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return the training and the validation pictures, each by image id.

    Entries of one file, and files with the same bytes, stay on one side. At least one picture lies on each side, unless
    `val_size` is 0.
    """
    groups = _group(sorted(records, key=lambda record: record.image_id))
    names = sorted(groups)
    if val_size == 0:
        return _collect(groups, names), []
    if len(names) < 2:
        raise UserError("need at least 2 images to split; --dataset.val_size 0 trains without validation")
    random.Random(seed).shuffle(names)
    val_count = min(max(1, round(len(names) * val_size)), len(names) - 1)
    return _collect(groups, names[val_count:]), _collect(groups, names[:val_count])


def _group(records: list[Record]) -> dict[str, list[Record]]:
    """Return the pictures that must stay together, under the name of one of them that no order changes."""
    first_name: dict[str, str] = {}
    for record in records:
        if record.digest:
            first_name[record.digest] = min(record.file_name, first_name.get(record.digest, record.file_name))
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(first_name.get(record.digest, record.file_name), []).append(record)
    return groups


def _collect(groups: dict[str, list[Record]], names: list[str]) -> list[Record]:
    return sorted((record for name in names for record in groups[name]), key=lambda record: record.image_id)
