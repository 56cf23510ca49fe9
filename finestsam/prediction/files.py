"""The files of a prediction: the images to predict, and the names of each image's outputs."""

import glob
import itertools
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from finestsam.errors import UserError, name_count, printable
from finestsam.images.files import IMAGE_SUFFIXES
from finestsam.runtime.folders import is_replaceable

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".flv", ".mpg", ".mpeg"}
# What lies beside the images is marked: it overwrites none, and is not taken for an image the next time.
BESIDE_MARK = ".finestsam"
OVERLAY_SUFFIX, LABELS_SUFFIX = ".png", ".classes.png"
MAX_STEM_BYTES = 200  # of the 255 that file systems allow a name; a number and the suffix follow


def find_images(inputs: list[str], out_dir: Path | None = None) -> list[Path]:
    """Return the images that files, folders and patterns name, each once, in the order given.

    Args:
        out_dir: overlays of an earlier run that a pattern with `**` finds there are left out with a message.

    Raises:
        UserError: with a line for each input that names no image.
    """
    found, problems = {}, []
    for text in inputs:
        try:
            for path in _expand(text, out_dir):
                found.setdefault(os.path.realpath(path), path)
        except UserError as error:
            problems.append(f"--input {printable(text)}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return list(found.values())


def _expand(text: str, out_dir: Path | None) -> list[Path]:
    path = Path(text)
    if os.path.isdir(text):
        return _list_folder(path)
    if os.path.exists(text):  # Path.exists raises on a name that is too long
        if path.suffix.lower() in VIDEO_SUFFIXES:
            raise UserError("a video; cut it into images first, as in: ffmpeg -i video.mp4 frames/%05d.png")
        return [path]
    if not glob.has_magic(text):
        raise UserError("no such file or folder")
    images = [Path(name) for name in sorted(_match(text)) if _is_image(Path(name))]
    if out_dir and "**" in text:
        images = _leave_out(images, Path(text), out_dir)
    if not images:
        raise UserError("no image matches this pattern")
    return images


def _match(pattern: str) -> set[str]:
    """Return the names that match a pattern.

    `**` reads each folder once, whatever links lead to it: links to a parent folder would have no end.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        return set(glob.glob(pattern))
    index = parts.index("**")
    starts = glob.glob(os.path.join(*parts[:index])) if index else ["."]
    rest = parts[index + 1 :] or ("*",)
    folders = itertools.chain.from_iterable(map(_walk, starts))
    return {name for folder in folders for name in _match(os.path.join(glob.escape(folder), *rest))}


def _walk(start: str) -> Iterator[str]:
    """Yield a folder and all folders below it that are not hidden, each once; linked folders come last."""
    waiting, seen = deque([start]), set()
    while waiting:
        folder = waiting.popleft()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError:  # not a folder, or none that can be read
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        below = [entry for entry in entries if os.path.isdir(entry.path) and not entry.name.startswith(".")]
        waiting.extend(entry.path for entry in below)


def _leave_out(images: list[Path], pattern: Path, out_dir: Path) -> list[Path]:
    """Return the paths outside `out_dir`; all of them where the pattern itself starts there."""
    root, start = out_dir.resolve(), Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    if start.resolve().is_relative_to(root):
        return images
    left = [path for path in images if not Path(os.path.realpath(path)).is_relative_to(root)]
    if len(left) < len(images):
        print(f"{printable(out_dir)}: {name_count(len(images) - len(left), 'image')} left out: there the results go")
    return left


def _list_folder(folder: Path) -> list[Path]:
    try:
        images = sorted(path for path in folder.iterdir() if _is_image(path))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    if not images:
        raise UserError(f"no image in this folder; for those of its subfolders ask for '{folder / '**' / '*'}'")
    return images


def _is_image(path: Path) -> bool:
    """Whether a name is an image's; broken links count, so that they are reported."""
    is_ours = path.name.endswith((BESIDE_MARK + OVERLAY_SUFFIX, BESIDE_MARK + LABELS_SUFFIX))
    is_named_so = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    return is_named_so and not is_ours and not os.path.isdir(path)


def name_overlays(paths: list[Path], out_dir: Path) -> list[Path]:
    """Return where each image's overlay goes, as `name_outputs` has it."""
    return [overlay for (overlay,) in name_outputs(paths, out_dir, (OVERLAY_SUFFIX,))]


def name_outputs(paths: list[Path], out_dir: Path, suffixes: tuple[str, ...]) -> list[tuple[Path, ...]]:
    """Return the paths of each image's outputs: named after it, unique, never over an input or another program's file.

    Args:
        suffixes: of the files that each image gets.
    """
    # Case is ignored, because on Windows and macOS a.png is A.png. An input may be a link to a file in that folder.
    files = [file for path in paths for file in (path, Path(os.path.realpath(path)))]
    taken = {file.name.casefold() for file in files if file.parent.samefile(out_dir)}
    lies_beside = bool(taken)
    outputs = []
    for path in paths:
        stem = _sanitize(path.stem)
        names = next(names for names in _list_names(stem, "", suffixes) if taken.isdisjoint(map(str.casefold, names)))
        if lies_beside or not _are_replaceable(out_dir, names):
            names = next(
                names
                for names in _list_names(stem, BESIDE_MARK, suffixes)
                if taken.isdisjoint(map(str.casefold, names)) and _are_replaceable(out_dir, names)
            )
        outputs.append(tuple(out_dir / name for name in names))
        taken.update(map(str.casefold, names))
    return outputs


def _list_names(stem: str, mark: str, suffixes: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield names for an image's outputs: without a number, then with 2, 3, ..."""
    for tail in itertools.chain([""], (f"_{number}" for number in itertools.count(2))):
        yield [f"{stem}{tail}{mark}{suffix}" for suffix in suffixes]


def _are_replaceable(out_dir: Path, names: list[str]) -> bool:
    return all(is_replaceable(out_dir / name) for name in names)


def _sanitize(stem: str) -> str:
    safe = "".join(letter if letter.isprintable() and letter not in '<>:"/\\|?*' else "_" for letter in stem)
    return safe.encode()[:MAX_STEM_BYTES].decode(errors="ignore").strip(". ") or "image"
