"""Recognise the format and the folders of a dataset."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finestsam.errors import UserError
from finestsam.images.files import IMAGE_SUFFIXES

ANNOTATION_FILE = "annotations.json"
ACCEPTED = (
    "expected finestSAM's data/{images,annotations.json} to be split, or train/ and val/ in that form; or an "
    "export of Roboflow, COCO, CVAT, Label Studio or labelme, images/ with labels/ or masks/, or YOLO's text files"
)
# By name of a part: the names that its folder can have.
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
KIND_NAMES = {
    "coco": "COCO annotations",
    "labelme": "labelme",
    "masks": "images and masks",
    "yolo": "YOLO segmentation",
}
MASK_FOLDERS = ("labels", "masks")
PEEKED_BYTES = 1 << 16


@dataclass(frozen=True)
class Part:
    """One part of a dataset: its labels and the folder of its images."""

    images_dir: Path
    labels: Path  # COCO's annotation file, else the folder of the label files
    kind: Literal["coco", "labelme", "masks", "yolo"]
    root: Path  # folder of the dataset; no file outside it is opened


@dataclass(frozen=True)
class Layout:
    """A dataset's parts: `all` if it is not split yet, else `train` and, if they exist, `val` and `test`."""

    name: str  # for messages
    parts: dict[str, Part]
    is_plain: bool = False  # True: no sign that a part of it is for validation, so it is evaluated whole


def find_layout(root: Path, auto_split: bool | None = None) -> Layout:
    """Recognise the layout of a dataset folder, or of an annotation file with images beside it.

    Args:
        auto_split: decides if both exist: True reads `data/`, False reads `train/` and `val/`.

    Raises:
        UserError: no such folder, no known layout in it, or two layouts at once.
    """
    if root.is_file():
        return Layout(f"the annotation file {root.name}", {"all": _make_coco_part(root, root.parent)}, is_plain=True)
    if not root.is_dir():
        raise UserError(f"dataset {root}: no such folder; {ACCEPTED}")
    data, split = _find_part(root / "data", root), _find_split_folders(root)
    if data and split and auto_split is None:
        raise UserError(
            f"dataset {root} has both data/ and train/: --dataset.auto_split true splits data/, false reads train/"
        )
    if split and not (data and auto_split):
        if auto_split:
            raise UserError(f"dataset {root}: dataset.auto_split is true, but {root / 'data'} has no labels")
        return _describe_split(split)
    subsets = {} if data else _find_coco_subsets(root) or _find_pair_subsets(root)
    if auto_split is False and "train" not in subsets:
        raise UserError(f"dataset {root}: dataset.auto_split is false, but {root / 'train'} has no labels")
    if data:
        return Layout(f"{KIND_NAMES[data.kind]}: data/, to be split", {"all": data})
    if "train" in subsets:
        return _describe_split(subsets)
    if subsets:
        (part,) = _only_one(root, subsets).values()
        return Layout(f"{KIND_NAMES[part.kind]}: {part.labels.name}", {"all": part}, is_plain=True)
    part = _find_part(root, root)
    if part is None:
        raise UserError(_describe_nothing_found(root))
    return Layout(f"{KIND_NAMES[part.kind]} in one folder", {"all": part}, is_plain=True)


def _find_split_folders(root: Path) -> dict[str, Part]:
    parts = {}
    for name, folder_names in SPLIT_FOLDERS.items():
        folders = [root / folder_name for folder_name in folder_names if (root / folder_name).is_dir()]
        found = [part for part in (_find_part(folder, root) for folder in folders) if part]
        if len(found) > 1:
            raise UserError(f"dataset {root} has {' and '.join(folder.name for folder in folders)}: keep one of them")
        if found:
            parts[name] = found[0]
        elif folders and name == "val" and "train" in parts:
            raise UserError(f"dataset {root}: {folders[0].name}/ has no labels; fill or remove it")
    return parts if "train" in parts else {}


def _describe_split(parts: dict[str, Part]) -> Layout:
    kind = next(iter(parts.values())).kind
    if any(part.kind != kind for part in parts.values()):
        raise UserError(f"dataset {parts['train'].root}: its parts are labelled in different formats, expected one")
    labels = ", ".join(part.labels.relative_to(part.root).as_posix() for part in parts.values())
    return Layout(f"{KIND_NAMES[kind]}: {labels}{'' if 'val' in parts else ', train to be split'}", parts)


def _find_part(folder: Path, root: Path) -> Part | None:
    """Return the part in one folder, in any format."""
    if not folder.is_dir():
        return None
    for name in (ANNOTATION_FILE, "_annotations.coco.json", ".annotations.coco.json", "result.json"):
        if (folder / name).is_file():
            return _make_coco_part(folder / name, root)
    return _find_labelme(folder, root) or _find_pairs(folder, root) or _find_lone_coco(folder, root)


def _make_coco_part(file: Path, root: Path) -> Part:
    images_dir = file.parent / "images"
    return Part(images_dir if images_dir.is_dir() else file.parent, file, "coco", root)


def _find_labelme(folder: Path, root: Path) -> Part | None:
    images_dir = folder / "images" if (folder / "images").is_dir() else folder
    for labels in (folder / "annotations", images_dir, folder):
        files = sorted(labels.glob("*.json"))[:20]
        if any(_mentions(file, b'"shapes"') and not _looks_like_coco(file) for file in files):
            return Part(images_dir, labels, "labelme", root)
    return None


def _find_pairs(folder: Path, root: Path) -> Part | None:
    """Return a part of images with masks or text files of the same names."""
    if not (folder / "images").is_dir():
        return None
    for name in MASK_FOLDERS:
        labels = folder / name
        suffixes = set(_list_suffixes(labels))
        if suffixes & IMAGE_SUFFIXES:
            return Part(folder / "images", labels, "masks", root)
        if ".txt" in suffixes:
            return Part(folder / "images", labels, "yolo", root)
    return None


def _list_suffixes(folder: Path) -> Iterator[str]:
    """Yield the suffixes of the first files in a folder and in its subfolders."""
    for entry in _list_entries(folder)[:100]:
        if os.path.isdir(entry):
            yield from (file.suffix.lower() for file in _list_entries(entry)[:10])
        else:
            yield entry.suffix.lower()


def _list_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder, by name; empty if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _find_lone_coco(folder: Path, root: Path) -> Part | None:
    files = [file for file in sorted(folder.glob("*.json")) if _looks_like_coco(file)]
    return _make_coco_part(files[0], root) if len(files) == 1 else None


def _find_coco_subsets(root: Path) -> dict[str, Part]:
    """Return the parts in `annotations/instances_*.json`, the layout of COCO, CVAT and others."""
    folder = root / "annotations"
    if (root / ANNOTATION_FILE).is_file() or not folder.is_dir():
        return {}
    files = sorted(folder.glob("instances_*.json"))
    files = files or [file for file in sorted(folder.glob("*.json"))[:20] if _looks_like_coco(file)]
    parts: dict[str, Part] = {}
    for file in files:
        subset = file.stem.removeprefix("instances_")
        folders = (root / subset, root / "images" / subset, root / "images", root)
        images_dir = next(folder for folder in folders if folder.is_dir())
        name = _name_subset(subset)
        if name in parts:
            raise UserError(f"dataset {root}: {file.name} and {parts[name].labels.name} are both for {name}: keep one")
        parts[name] = Part(images_dir, file, "coco", root)
    return parts


def _find_pair_subsets(root: Path) -> dict[str, Part]:
    """Return the parts in `images/train` with `labels/train` (or val, test; or masks/)."""
    parts = {}
    for mask_folder in MASK_FOLDERS:
        for name, folder_names in SPLIT_FOLDERS.items():
            for folder_name in folder_names:
                images_dir, labels = root / "images" / folder_name, root / mask_folder / folder_name
                if images_dir.is_dir() and labels.is_dir():
                    kind = "yolo" if ".txt" in _list_suffixes(labels) else "masks"
                    parts[name] = Part(images_dir, labels, kind, root)
    return parts


def _name_subset(subset: str) -> str:
    return next((name for name in SPLIT_FOLDERS if name in subset.lower()), "all")


def _only_one(root: Path, parts: dict[str, Part]) -> dict[str, Part]:
    if len(parts) > 1:
        names = ", ".join(part.labels.name for part in parts.values())
        raise UserError(f"dataset {root}: none of {names} is for training; give one of these files as --dataset")
    return parts


def _mentions(file: Path, key: bytes) -> bool:
    """Return whether a json file has a key near its beginning or its end; an embedded image may lie between."""
    try:
        if not file.is_file():
            return False
        with open(file, "rb") as stream:
            head = stream.read(PEEKED_BYTES)
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - PEEKED_BYTES))
            return key in head or key in stream.read()
    except OSError:
        return False


def _looks_like_coco(file: Path) -> bool:
    return _mentions(file, b'"images"') and _mentions(file, b'"annotations"')


def _describe_nothing_found(root: Path) -> str:
    nearby = sorted(path.relative_to(root).as_posix() for path in root.glob("**/*.json"))[:5]
    found = f"; json files found: {', '.join(nearby)}" if nearby else "; no json file in it"
    return f"dataset {root}: {root / 'data' / ANNOTATION_FILE} is missing; {ACCEPTED}{found}"
