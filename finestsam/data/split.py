"""Split images into training and validation. The split depends on the seed and the images, not on their order."""

import random
from collections.abc import Collection, Mapping

from finestsam.errors import UserError
from finestsam.records import Record

# Digits of a file's hash that identify an image.
DIGITS = 16


def split_records(records: list[Record], val_size: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return the training and the validation images, each by image id.

    Entries of one file, and files with the same bytes, stay on the same side. Unless `val_size` is 0, each side has at
    least one image, and at least one image with objects if there are two.
    """
    groups = _group(sorted(records, key=lambda record: record.image_id))
    names = sorted(groups)
    if val_size == 0:
        return _collect(groups, names), []
    if len(names) < 2:
        raise UserError("need at least 2 images to split; --dataset.val_size 0 trains without validation")
    random.Random(seed).shuffle(names)
    labelled, empty = [], []
    for name in names:
        (labelled if any(record.annotations for record in groups[name]) else empty).append(name)
    val_count = _count_val(len(names), val_size)
    val_labelled = _count_val(len(labelled), val_size)
    val_empty = min(max(0, val_count - val_labelled), len(empty))
    val = labelled[:val_labelled] + empty[:val_empty]
    return _collect(groups, labelled[val_labelled:] + empty[val_empty:]), _collect(groups, val)


def split_as_before(
    records: list[Record], sides: Mapping[str, Collection[str]]
) -> tuple[list[Record], list[Record]] | None:
    """Return the training and the validation images of an earlier split; None: the dataset is a different one.

    The dataset is the same if it has every validation image of the earlier split. Other new images are left out.

    Args:
        sides: for `train` and `val`, the first `DIGITS` of the images' hashes.
    """
    if not sides["val"] or not set(sides["val"]) <= {record.digest[:DIGITS] for record in records}:
        return None
    train, val = ([record for record in records if record.digest[:DIGITS] in sides[side]] for side in ("train", "val"))
    return train, val


def _count_val(count: int, val_size: float) -> int:
    """Return how many of `count` images are for validation: at least one, but not all; none of a single image."""
    return min(max(1, round(count * val_size)), max(0, count - 1))


def _group(records: list[Record]) -> dict[str, list[Record]]:
    """Return groups of images that must stay on the same side, by the first of their names in the alphabet."""
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
