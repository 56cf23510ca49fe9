"""Cache the result of a dataset check, so that a large dataset is checked only once.

The cache is plain json, never code. It is used only if labels, images and settings are unchanged and its signature by
this user's key is valid. So an edited file, or one that another user left beside the dataset, is replaced. A cache file
is safe to delete.
"""

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from finestsam.config import DatasetConfig
from finestsam.errors import Defect
from finestsam.formats.layouts import Part
from finestsam.formats.yolo import read_names
from finestsam.masks import segmentation_to_rle
from finestsam.records import Annotation, DatasetReport, Finding, Index, Record
from finestsam.runtime.folders import cache_folder
from finestsam.runtime.whole_files import write_text

# Increase it when reading the same files gives a different result.
VERSION = 4
SECRET_NAME, SECRET_BYTES = "cache.key", 32
# Settings that do not change how an image and its labels are read.
UNREAD_SETTINGS = {
    "path", "auto_split", "seed", "val_size", "use_cache", "sav", "positive_points", "negative_points", "use_center",
    "snap_to_grid", "max_objects", "download", "download_images", "background_points", "labels",
    "prompts_per_object",
}  # fmt: skip


def find_cache_file(part: Part, settings: DatasetConfig) -> Path:
    """Return the cache file of a part: beside the annotations if `settings.sav` names it, else in the cache folder."""
    if settings.sav:
        folder = part.labels if part.labels.is_dir() else part.labels.parent
        return folder / Path(settings.sav).name
    name = hashlib.sha256(str(part.labels.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return cache_folder() / "datasets" / f"{name}.json"


def compute_key(part: Part, settings: DatasetConfig, cache_file: Path) -> str:
    """Return a hash of everything that the index depends on. For images these are file size and modification time."""
    wanted = {name: value for name, value in dataclasses.asdict(settings).items() if name not in UNREAD_SETTINGS}
    digest = hashlib.sha256(json.dumps([VERSION, part.kind, wanted], sort_keys=True, allow_nan=False).encode())
    if part.labels.is_file():
        digest.update(part.labels.read_bytes())
    if part.kind == "yolo":  # class names are in files outside both folders
        digest.update(json.dumps(sorted(read_names(part, settings).items()), allow_nan=False).encode())
    for folder in dict.fromkeys([part.images_dir, part.labels]):
        for path, _, file_names in sorted(os.walk(folder)):
            for name in sorted(file_names):
                file = os.path.join(path, name)
                if file == str(cache_file) or name.startswith("."):
                    continue
                try:
                    status = os.stat(file)
                except OSError:
                    continue  # a broken link
                line = f"{file} {status.st_size} {status.st_mtime_ns}"
                digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_index(path: Path, key: str, part: Part, settings: DatasetConfig) -> Index | None:
    """Return the cached index; None: there is none for this key, or the file was changed.

    Two properties are checked again for safety: images lie in the dataset, and run lengths fit their image.
    """
    try:
        if not _is_own(path):
            return None
        head, body = path.read_text(encoding="utf-8").split("\n", 1)
        signature = _sign(key, body)
        if signature is None or json.loads(head) != {"key": key, "signature": signature}:
            return None
        content = json.loads(body)
        records = [_read_record(entry) for entry in content["records"]]
        resolve = os.path.abspath if settings.follow_symlinks else os.path.realpath
        folders = (part.root, part.images_dir, cache_folder() / "images")  # the last has images out of labelme's files
        roots = tuple(f"{resolve(folder)}{os.sep}" for folder in folders)
        if not all(resolve(record.path).startswith(roots) and _has_sound_masks(record) for record in records):
            return None
        findings = [Finding(**finding) for finding in content["report"].pop("findings")]
        categories = {int(number): name for number, name in content["categories"].items()}
        return Index(records, categories, DatasetReport(**content["report"], findings=findings))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # missing, from another version, or damaged


def write_index(path: Path, key: str, index: Index) -> None:
    """Write an index to the cache. A failure costs only time."""
    content = {
        "categories": index.categories,
        "report": dataclasses.asdict(index.report),
        "records": [_write_record(record) for record in index.records],
    }
    body = json.dumps(content, allow_nan=False)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        signature = _sign(key, body)
        if signature is not None:
            write_text(path, json.dumps({"key": key, "signature": signature}, allow_nan=False) + "\n" + body)


def _read_record(entry: dict) -> Record:
    annotations = [
        Annotation(number, category_id, counts.encode("ascii"), area, box, source_id)
        for number, category_id, counts, area, box, source_id in entry["annotations"]
    ]
    return Record(
        entry["image_id"],
        entry["file_name"],
        Path(entry["path"]),
        tuple(entry["size"]),
        annotations,
        [counts.encode("ascii") for counts in entry["crowds"]],
        entry["digest"],
        entry["crowd_categories"],
    )


def _write_record(record: Record) -> dict:
    return {
        "image_id": record.image_id,
        "file_name": record.file_name,
        "path": str(record.path.absolute()),
        "size": record.size,
        "annotations": [
            [found.id, found.category_id, found.counts.decode("ascii"), found.area, found.box, found.source_id]
            for found in record.annotations
        ],
        "crowds": [counts.decode("ascii") for counts in record.crowds],
        "digest": record.digest,
        "crowd_categories": record.crowd_categories,
    }


def _has_sound_masks(record: Record) -> bool:
    """Return whether all run lengths of a record are valid: pycocotools does not check them."""
    for counts in [*(found.counts for found in record.annotations), *record.crowds]:
        try:
            segmentation_to_rle({"size": list(record.size), "counts": counts}, record.size)
        except Defect as defect:
            if defect.code != "empty_mask":
                return False
    return True


def _sign(key: str, body: str) -> str | None:
    """Return the signature of an index by this user's key; None: the key cannot be stored."""
    try:
        secret = _read_secret(cache_folder() / SECRET_NAME)
    except OSError:
        return None
    return hmac.new(secret, f"{key}\n{body}".encode(), "sha256").hexdigest() if secret else None


def _read_secret(path: Path) -> bytes | None:
    """Return the user's key, made at the first call; None: another process is making it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
    content = path.read_bytes() if _is_own(path) else b""
    return content if len(content) == SECRET_BYTES else None


def _is_own(path: Path) -> bool:
    """Return whether this is a regular file that belongs to this user."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())
