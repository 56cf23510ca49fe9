"""Fetch a part of COCO 2017, whole or its first images, into the layout in which COCO itself lies.

    {root}/annotations/instances_val2017.json    put there last: what it lists is there
    {root}/val2017/000000000139.jpg
    {root}/.coco-val2017/                        what is not finished; beside a part of the images, all annotations

Archives are removed once they are unpacked. Other files are left as they are.
"""

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from finestsam.errors import UserError
from finestsam.runtime.archive import unpack
from finestsam.runtime.download import download, download_all, lock
from finestsam.runtime.whole_files import write_bytes

# The bucket of images.cocodataset.org under the name that its certificate is for: that address has none of its own
# (github.com/mlcommons/inference/pull/2572).
BASE_URL = "https://s3.amazonaws.com/images.cocodataset.org"
LIMIT_BYTES = 40_000_000_000  # unpacked; the largest part takes 20 GB

# Only images have this key. The spaces are those of COCO and of json.dumps.
FILE_NAME = re.compile(rb'"file_name": ?"([^"\\]+)"')


@dataclass(frozen=True)
class Archive:
    """One of the files that COCO publishes."""

    path: str  # below the address
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class CocoPart:
    """One of the parts of COCO whose instances are labelled."""

    name: str
    image_count: int
    images: Archive


# Sizes and hashes: tensorflow/datasets, url_checksums/coco2017.txt; the hashes and the numbers of images agree with
# pytorch/vision, prototype/datasets/_builtin/coco.py.
ANNOTATIONS = Archive(
    "annotations/annotations_trainval2017.zip",
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    252_907_541,
)
PARTS = {
    "coco-val2017": CocoPart(
        "val2017",
        5_000,
        Archive("zips/val2017.zip", "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", 815_585_330),
    ),
    "coco-train2017": CocoPart(
        "train2017",
        118_287,
        Archive(
            "zips/train2017.zip", "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", 19_336_861_798
        ),
    ),
}  # test2017 and unlabeled2017 have no instances to train on
COCO_PARTS = tuple(PARTS)


@dataclass(frozen=True)
class Targets:
    """Where the files of one part lie."""

    annotations: Path
    images: Path
    work: Path

    def count_complete(self) -> int:
        """Return how many images the annotations list, if all of them are there, else 0."""
        names = list_images(self.annotations.read_bytes()) if self.annotations.is_file() else []
        return 0 if find_missing(self.images, names) else len(names)


def fetch_coco(name: str, root: Path, image_count: int | None = None, base_url: str | None = None) -> None:
    """Download a part of COCO into a folder. An interrupted download continues; a complete one needs no network.

    Args:
        name: one of `COCO_PARTS`.
        image_count: only so many images: those with an object that is no crowd first, then by their ids, so that a
            smaller number's images are among a larger one's. More that are already there are left there.
        base_url: of a mirror; None: $FINESTSAM_COCO_URL or COCO's own. https, or http on this machine.
    """
    part = PARTS[name]
    targets = Targets(root / f"annotations/instances_{part.name}.json", root / part.name, root / f".{name}")
    wanted = min(image_count or part.image_count, part.image_count)
    base_url = base_url or os.environ.get("FINESTSAM_COCO_URL") or BASE_URL
    try:
        count = targets.count_complete()
        if count < wanted:
            root.mkdir(parents=True, exist_ok=True)
            with lock(root / f".{name}.lock", root):
                count = targets.count_complete()  # another process may have fetched it meanwhile
                if count < wanted:
                    print(f"fetching {wanted:,} images of {name} into {root}", file=sys.stderr)
                    _fetch(part, targets, wanted, base_url.rstrip("/"))
                    count = wanted
    except OSError as error:
        raise UserError(f"cannot fetch {name} into {root}: {error.strerror or error}") from error
    if count > wanted:
        print(f"{root} holds {count:,} images of {name}, more than {wanted:,}: all are used", file=sys.stderr)


def _fetch(part: CocoPart, targets: Targets, wanted: int, base_url: str) -> None:
    all_annotations = _fetch_annotations(part, targets, base_url)
    _refuse_foreign(targets.annotations, all_annotations, wanted)
    annotations = restrict_annotations(all_annotations, wanted)
    names = list_images(annotations)
    targets.images.mkdir(exist_ok=True)
    missing = find_missing(targets.images, names)
    is_whole = wanted == part.image_count
    if is_whole and missing:
        _fetch_all_images(part, targets, missing, base_url)
    elif missing:
        urls = {targets.images / name: f"{base_url}/{part.name}/{name}" for name in missing}
        download_all(urls, f"images of {part.name}")
    targets.annotations.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(targets.annotations, annotations)
    if is_whole:
        shutil.rmtree(targets.work)


def _fetch_annotations(part: CocoPart, targets: Targets, base_url: str) -> bytes:
    """Return the annotations of all images of the part."""
    name = f"annotations/instances_{part.name}.json"
    archive, folder = targets.work / "annotations.zip", targets.work / "annotations"
    if not folder.is_dir():
        download(f"{base_url}/{ANNOTATIONS.path}", archive, ANNOTATIONS.sha256, ANNOTATIONS.size_bytes)
        unpack(archive, folder, lambda member: member == name, LIMIT_BYTES)
    archive.unlink(missing_ok=True)
    return (folder / name).read_bytes()


def _fetch_all_images(part: CocoPart, targets: Targets, missing: list[str], base_url: str) -> None:
    """Fetch the archive of all images and move the missing ones into the folder."""
    archive, folder = targets.work / f"{part.name}.zip", targets.work / "images"
    if not folder.is_dir():
        _refuse_full_disk(archive, part.images.size_bytes)
        download(f"{base_url}/{part.images.path}", archive, part.images.sha256, part.images.size_bytes)
        unpack(archive, folder, limit_bytes=LIMIT_BYTES)
    archive.unlink(missing_ok=True)
    for name in missing:
        if not (folder / part.name / name).is_file():
            raise UserError(f"{folder}: {part.name}/{name} is missing; remove {targets.work} and start again")
        os.replace(folder / part.name / name, targets.images / name)


def _refuse_full_disk(archive: Path, size_bytes: int) -> None:
    """Raise before hours of downloading if the archive and its images, which take as much again, do not fit."""
    begun = [archive, archive.with_name(f".{archive.name}.part")]
    needed = 2 * size_bytes - sum(path.stat().st_size for path in begun if path.is_file())
    free = shutil.disk_usage(archive.parent).free
    if free < needed:
        raise UserError(
            f"{archive.parent}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed for the archive and "
            "its images; --dataset.download_images N fetches only so many"
        )


def _refuse_foreign(existing: Path, all_annotations: bytes, wanted: int) -> None:
    """Raise if there is an annotation file that finestsam did not write, or wrote for more images."""
    if not existing.exists():
        return
    content = existing.read_bytes()
    count = len(list_images(content))
    if count > wanted:
        raise UserError(
            f"{existing} lists {count:,} images that are not all there, more than the {wanted:,} requested; request "
            "as many, or move it away"
        )
    if content != restrict_annotations(all_annotations, count):
        raise UserError(f"{existing} is not COCO's own and is not overwritten; move it away, or choose another folder")


def restrict_annotations(content: bytes, image_count: int) -> bytes:
    """Return COCO's annotations of its first images only; for all images they are unchanged.

    The order is that of `fetch_coco`.
    """
    if image_count >= len(list_images(content)):
        return content
    annotations = json.loads(content)
    labelled = {entry["image_id"] for entry in annotations["annotations"] if not entry["iscrowd"]}
    ids = sorted((image["id"] for image in annotations["images"]), key=lambda number: (number not in labelled, number))
    kept = set(ids[:image_count])
    annotations["images"] = [image for image in annotations["images"] if image["id"] in kept]
    annotations["annotations"] = [entry for entry in annotations["annotations"] if entry["image_id"] in kept]
    return json.dumps(annotations, allow_nan=False).encode()


def list_images(content: bytes) -> list[str]:
    """Return the file names in COCO's annotations, without parsing: parsed, those of train2017 take 3 GB."""
    return [name.decode(errors="replace") for name in FILE_NAME.findall(content)]


def find_missing(folder: Path, names: list[str]) -> list[str]:
    """Return the names whose file in the folder is missing or empty."""
    entries = os.scandir(folder) if folder.is_dir() else []
    there = {entry.name for entry in entries if entry.is_file() and entry.stat().st_size}
    return [name for name in names if name not in there]
