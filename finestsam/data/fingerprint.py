"""What a dataset is made of, in short: a run that is continued knows its own by it, and names what has changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from finestsam.data.read import LabelledSet
from finestsam.data.split import DIGITS
from finestsam.errors import printable
from finestsam.records import Record

SPLIT = "split.json"  # of a run: the fingerprint of what it learns from and is validated on
SIDES = ("train", "val")
NAMED = 3


def take_fingerprint(data: LabelledSet) -> dict[str, Any]:
    """Return the categories, and for each image of either side its name and hashes of its file and of its labels."""
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
        "image": record.digest[:DIGITS],
        "labels": labels.hexdigest()[:DIGITS],
    }


def hash_fingerprint(fingerprint: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_sides(run: Path) -> dict[str, frozenset[str]] | None:
    """Return the first `DIGITS` of the digests of what a run learns from, `train`, and is validated on, `val`.

    None where its folder does not tell.
    """
    try:
        content = json.loads((run / SPLIT).read_text(encoding="utf-8"))
        return {side: frozenset(str(entry["image"]) for entry in content[side]) for side in SIDES}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, each difference in a few words."""
    old, new = ({side: {entry["file_name"]: entry for entry in one[side]} for side in SIDES} for one in (before, now))
    gone = {side: old[side].keys() - new[side].keys() for side in SIDES}
    come = {side: new[side].keys() - old[side].keys() for side in SIDES}
    moved = (gone["train"] & come["val"]) | (gone["val"] & come["train"])
    found = {
        "new": (come["train"] | come["val"]) - moved,
        "gone": (gone["train"] | gone["val"]) - moved,
        "on the other side of the split": moved,
        "another file": _list_different("image", old, new),
        "with other labels": _list_different("labels", old, new),
    }
    changes = [f"{what}: {_name_some(names)}" for what, names in found.items() if names]
    if before["categories"] != now["categories"]:
        listed = (", ".join(map(printable, one["categories"].values())) for one in (now, before))
        changes.append("categories {}, were {}".format(*listed))
    return changes


def _list_different(part: str, old: dict[str, dict], new: dict[str, dict]) -> set[str]:
    """Return the names of images on the same side as before, of which a part has changed."""
    return {
        name
        for side in SIDES
        for name in old[side].keys() & new[side].keys()
        if old[side][name][part] != new[side][name][part]
    }


def _name_some(names: set[str]) -> str:
    some = [printable(name) for name in sorted(names)[:NAMED]]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(some) + more
