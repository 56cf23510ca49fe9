"""Split images into training and validation: the same split for the same seed and images, in any order."""

import random
from collections.abc import Collection, Mapping

from finestsam.errors import UserError
from finestsam.records import Record

# Of a file's hash, enough to know an image again.
DIGITS = 16


def split_records(records: list[Record], val_size: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return the training and the validation images, each by image id.

    Entries of one file, and files with the same bytes, stay on one side. At least one image lies on each side, and of
    images with objects, where there are two, unless `val_size` is 0.
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
    """Return the training and the validation images of an earlier split; None where the dataset is another one.

    It is the same where every image that was validated on is there. Images on neither side are left out.

    Args:
        sides: under `train` and `val` the first `DIGITS` of the images' digests.
    """
    if not sides["val"] or not set(sides["val"]) <= {record.digest[:DIGITS] for record in records}:
        return None
    train, val = ([one for one in records if one.digest[:DIGITS] in sides[name]] for name in ("train", "val"))
    return train, val


def _count_val(count: int, val_size: float) -> int:
    """Return how many of so many images are for validation: at least one, and not all; one alone is for training."""
    return min(max(1, round(count * val_size)), max(0, count - 1))


def _group(records: list[Record]) -> dict[str, list[Record]]:
    """Return the images that must stay together, under the name of one of them that no order changes."""
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
