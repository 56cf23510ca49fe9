"""Fingerprint of a dataset: a resumed run recognises its dataset by it, and reports what has changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from finestsam.data.read import LabelledSet
from finestsam.data.split import DIGITS
from finestsam.errors import printable
from finestsam.records import Record

SPLIT = "split.json"  # in a run folder: the fingerprint of the training and validation images
SIDES = ("train", "val")
IMAGE, OLD_IMAGE = "image", "picture"  # the name of an image's hash, and its name in the first runs
NAMED = 3  # files of one kind of change that are listed by name


def take_fingerprint(data: LabelledSet) -> dict[str, Any]:
    """Return the categories, and for each training and validation image its name and hashes of its file and labels."""
    categories = {str(category): name for category, name in sorted(data.category_names.items())}
    sides = {"train": data.train, "val": data.val}
    return {"categories": categories} | {side: [_describe(record) for record in sides[side]] for side in SIDES}


def _describe(record: Record) -> dict[str, Any]:
    labels = hashlib.sha256(f"{record.size}".encode())
    for annotation in record.annotations:
        labels.update(f" {annotation.id} {annotation.category_id} ".encode() + annotation.counts)
    for counts in record.crowds:
        labels.update(b" crowd " + counts)
    return {
        "id": record.image_id,
        "file_name": record.file_name,
        IMAGE: record.digest[:DIGITS],
        "labels": labels.hexdigest()[:DIGITS],
    }


def read_fingerprint(path: Path) -> dict[str, Any]:
    """Return the fingerprint that a run has written, with the names of today.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: it cannot be read, or it is none.
    """
    return _rename(json.loads(path.read_text(encoding="utf-8")), OLD_IMAGE, IMAGE)


def belongs_to(fingerprint: dict[str, Any], digest: str) -> bool:
    """Return whether a hash is that of a fingerprint, under the names of today or of the first runs."""
    return digest in map(hash_fingerprint, (fingerprint, _rename(fingerprint, IMAGE, OLD_IMAGE)))


def _rename(fingerprint: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    """Return the fingerprint with another name of one entry of each image."""
    return fingerprint | {
        side: [{after if name == before else name: value for name, value in entry.items()} for entry in entries]
        for side, entries in ((side, fingerprint[side]) for side in SIDES)
    }


def hash_fingerprint(fingerprint: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_sides(run: Path) -> dict[str, frozenset[str]] | None:
    """Return the first `DIGITS` of the hashes of a run's `train` and `val` images; None: no valid `split.json`."""
    try:
        content = read_fingerprint(run / SPLIT)
        return {side: frozenset(str(entry[IMAGE]) for entry in content[side]) for side in SIDES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def list_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences between two fingerprints, each in a few words."""
    old, new = ({side: {entry["file_name"]: entry for entry in data[side]} for side in SIDES} for data in (before, now))
    removed = {side: old[side].keys() - new[side].keys() for side in SIDES}
    added = {side: new[side].keys() - old[side].keys() for side in SIDES}
    moved = (removed["train"] & added["val"]) | (removed["val"] & added["train"])
    differences = {
        "new": (added["train"] | added["val"]) - moved,
        "gone": (removed["train"] | removed["val"]) - moved,
        "on the other side of the split": moved,
        "another file": _list_different(IMAGE, old, new),
        "with other labels": _list_different("labels", old, new),
    }
    changes = [f"{kind}: {_format_names(names)}" for kind, names in differences.items() if names]
    if before["categories"] != now["categories"]:
        listed = (", ".join(map(printable, data["categories"].values())) for data in (now, before))
        changes.append("categories {}, were {}".format(*listed))
    return changes


def _list_different(part: str, old: dict[str, dict], new: dict[str, dict]) -> set[str]:
    """Return the names of images on the same side of the split whose `part` ("image" or "labels") has changed."""
    return {
        name
        for side in SIDES
        for name in old[side].keys() & new[side].keys()
        if old[side][name][part] != new[side][name][part]
    }


def _format_names(names: set[str]) -> str:
    first = [printable(name) for name in sorted(names)[:NAMED]]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(first) + more
