"""Keep the index of an annotation file beside it, so that a large one is checked once.

Plain json, never code; keyed by the content of the annotation file and the list of pictures; safe to delete.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from finestsam.data.coco import Annotation, Index, Record, read_coco
from finestsam.data.layouts import Part
from finestsam.data.report import DatasetReport, Finding

# Raised whenever reading gives another result for the same files.
VERSION = 1


def read_coco_cached(part: Part, file_name: str) -> Index:
    """Return what `read_coco` returns, from the file `file_name` beside the annotations where that is still true."""
    path = part.annotation_file.with_name(Path(file_name).name)
    key = _compute_key(part)
    index = _read(path, key, part)
    if index is None:
        index = read_coco(part)
        _write(path, key, index)
    return index


def _compute_key(part: Part) -> str:
    digest = hashlib.sha256(f"{VERSION}".encode())
    digest.update(part.annotation_file.read_bytes() if part.annotation_file.is_file() else b"")
    for picture in sorted(part.images_dir.rglob("*")):
        status = picture.stat()
        if not picture.is_dir() and not picture.name.startswith(".") and picture.suffix != ".json":
            digest.update(f"{picture} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read(path: Path, key: str, part: Part) -> Index | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        records = [
            Record(
                entry["image_id"],
                entry["file_name"],
                part.images_dir / entry["path"],
                tuple(entry["size"]),
                [Annotation(*values[:2], values[2].encode("ascii"), *values[3:]) for values in entry["annotations"]],
            )
            for entry in content["records"]
        ]
        findings = [Finding(**finding) for finding in content["report"].pop("findings")]
        categories = {int(number): name for number, name in content["categories"].items()}
        return Index(records, categories, DatasetReport(**content["report"], findings=findings))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # missing, of another version or damaged: made anew


def _write(path: Path, key: str, index: Index) -> None:
    content = {
        "key": key,
        "categories": index.categories,
        "report": dataclasses.asdict(index.report),
        "records": [
            {
                "image_id": record.image_id,
                "file_name": record.file_name,
                "path": str(record.path.absolute()),
                "size": record.size,
                "annotations": [
                    [found.id, found.category_id, found.counts.decode("ascii"), found.area, found.box]
                    for found in record.annotations
                ],
            }
            for record in index.records
        ],
    }
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
