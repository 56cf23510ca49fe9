"""Recognise how a dataset lies in its folder."""

from dataclasses import dataclass
from pathlib import Path

from finestsam.errors import UserError

ANNOTATION_FILE = "annotations.json"
ACCEPTED = (
    "expected data/{images,annotations.json} to be split, train/ and val/ with {images,annotations.json} each, "
    "or {images,annotations.json} alone"
)


@dataclass(frozen=True)
class Part:
    """One annotation file and the folder of its pictures."""

    images_dir: Path
    annotation_file: Path


@dataclass(frozen=True)
class Layout:
    """A dataset's parts: `all` where it is not split yet, else `train` and, where there is one, `val`."""

    name: str  # for the screen
    parts: dict[str, Part]
    is_plain: bool = False  # nothing says that a part of it is for validation: evaluated whole


def find_layout(root: Path, auto_split: bool | None = None) -> Layout:
    """Recognise the layout by what is in the folder.

    Args:
        auto_split: which to read where both are there: True: `data/`, False: `train/` and `val/`.

    Raises:
        UserError: no such folder, nothing that is known in it, or two layouts at once.
    """
    if not root.is_dir():
        raise UserError(f"dataset {root}: no such folder; {ACCEPTED}")
    has_data, has_train = (_holds_annotations(root / name) for name in ("data", "train"))
    if has_data and has_train and auto_split is None:
        raise UserError(
            f"dataset {root} holds data/ and train/: --dataset.auto_split true splits the first, false reads the other"
        )
    if has_train and not (has_data and auto_split):
        if auto_split:
            raise UserError(
                f"dataset {root}: dataset.auto_split is true, but {root / 'data' / ANNOTATION_FILE} is missing"
            )
        return _read_split_folders(root)
    if auto_split is False:
        raise UserError(
            f"dataset {root}: dataset.auto_split is false, but {root / 'train' / ANNOTATION_FILE} is missing"
        )
    if has_data:
        return Layout("data/ to be split", {"all": _find_part(root / "data")})
    if _holds_annotations(root):
        return Layout("one folder of pictures and annotations", {"all": _find_part(root)}, is_plain=True)
    raise UserError(_describe_nothing_found(root))


def _holds_annotations(folder: Path) -> bool:
    return (folder / ANNOTATION_FILE).is_file()


def _read_split_folders(root: Path) -> Layout:
    parts = {"train": _find_part(root / "train")}
    if (root / "val").is_dir():
        if not _holds_annotations(root / "val"):
            raise UserError(f"dataset {root}: val/ is there, but {root / 'val' / ANNOTATION_FILE} is missing")
        parts["val"] = _find_part(root / "val")
    return Layout("train/ and val/" if "val" in parts else "train/ without val/, to be split", parts)


def _find_part(folder: Path) -> Part:
    images_dir = folder / "images"
    return Part(images_dir if images_dir.is_dir() else folder, folder / ANNOTATION_FILE)


def _describe_nothing_found(root: Path) -> str:
    nearby = sorted(path.relative_to(root).as_posix() for path in root.glob("**/*.json"))[:5]
    found = f"; json files found: {', '.join(nearby)}" if nearby else "; no json file in it"
    return f"dataset {root}: {root / 'data' / ANNOTATION_FILE} is missing; {ACCEPTED}{found}"
