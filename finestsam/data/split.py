"""Split pictures into training and validation: the same split for the same seed and pictures, in any order."""

import random

from finestsam.data.coco import Record
from finestsam.errors import UserError


def split_records(records: list[Record], val_size: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return the training and the validation pictures, each by image id.

    Entries of one file stay on one side. At least one picture lies on each side, unless `val_size` is 0.
    """
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.image_id):
        groups.setdefault(record.file_name, []).append(record)
    names = sorted(groups)
    if val_size == 0:
        return _collect(groups, names), []
    if len(names) < 2:
        raise UserError("need at least 2 images to split; --dataset.val_size 0 trains without validation")
    random.Random(seed).shuffle(names)
    val_count = min(max(1, round(len(names) * val_size)), len(names) - 1)
    return _collect(groups, names[val_count:]), _collect(groups, names[:val_count])


def _collect(groups: dict[str, list[Record]], names: list[str]) -> list[Record]:
    return sorted((record for name in names for record in groups[name]), key=lambda record: record.image_id)
