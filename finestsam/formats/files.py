"""Find and open the files of a dataset, and refuse those outside its folder."""

import os
import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote

from finestsam.config import DatasetConfig
from finestsam.errors import Defect
from finestsam.formats.layouts import Part
from finestsam.masks import Remark


class Border:
    """The border of a dataset: a link that leads out of its folders is not opened."""

    def __init__(self, part: Part, settings: DatasetConfig):
        self.follow_symlinks = settings.follow_symlinks
        self._roots = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in (part.root, part.images_dir))

    def check(self, path: Path) -> Path:
        """Return the path if it lies in the dataset.

        Raises:
            Defect: it leads outside.
        """
        if not self.follow_symlinks and not os.path.realpath(path).startswith(self._roots):
            raise Defect("outside_dataset", "a link that leads outside the dataset")
        return path

    def read_bytes(self, path: Path, max_bytes: int) -> bytes:
        """Return the content of a file of labels or names.

        Raises:
            Defect: it lies outside, is missing, is not a regular file, or has more than `max_bytes`.
        """
        self.check(path)
        try:
            if not path.is_file():  # False for folders, pipes and devices too: they must not be opened
                raise Defect(
                    "broken_labels", f"{path.name}: {'not a regular file' if path.exists() else 'no such file'}"
                )
            with open(path, "rb") as file:
                content = file.read(max_bytes + 1)  # the size alone is not reliable: /proc files report 0
        except OSError as error:
            raise Defect("broken_labels", f"{path.name} cannot be read: {error.strerror}") from None
        if len(content) > max_bytes:
            raise Defect("broken_labels", f"{path.name} has more than {max_bytes} bytes")
        return content


class FileFinder:
    """Finds images by the names in the annotations."""

    def __init__(self, part: Part, settings: DatasetConfig):
        self.images_dir = part.images_dir
        self.border = Border(part, settings)
        self._by_name: dict[str, list[Path]] | None = None

    def __call__(self, file_name: str) -> tuple[Path, list[Remark]]:
        """Return the path of an image, and a remark if it was not found under its exact name.

        Raises:
            Defect: no such image, or the name leads outside and no image inside has its last part as name.
        """
        parts = [part for part in re.split(r"[\\/]+", file_name) if part not in ("", ".")]
        leaves = file_name.startswith(("/", "\\")) or ".." in parts or ":" in file_name or "\0" in file_name
        path, remarks = None if leaves else self._find_as_written(parts), []
        if path is None and parts:
            path, remarks = self._find_by_name(parts[-1])
        if path is None and leaves:
            raise Defect("outside_dataset", f"{file_name!r:.80} leads outside the dataset")
        if path is None:
            raise Defect("missing_file", f"missing from {self.images_dir}")
        return self.border.check(path), remarks

    def _find_as_written(self, parts: list[str]) -> Path | None:
        # Some tools write `images/a.jpg` for images_dir/a.jpg.
        shorter = parts[1:] if parts and parts[0] == self.images_dir.name else []
        for names in (parts, shorter):
            path = self.images_dir.joinpath(*names)
            if names and os.path.lexists(path):  # False for a name that is too long for the disk
                return path
        return None

    def _find_by_name(self, name: str) -> tuple[Path | None, list[Remark]]:
        """Return the only file with this name in any subfolder, else the only one that differs in upper case."""
        if self._by_name is None:
            self._by_name = {}
            for folder, _, file_names in os.walk(self.images_dir):
                for found in sorted(file_names):
                    self._by_name.setdefault(_fold(found), []).append(Path(folder, found))
        candidates = self._by_name.get(_fold(name)) or self._by_name.get(_fold(unquote(name)), [])
        exact = [path for path in candidates if path.name == name]
        found = exact if len(exact) == 1 else candidates
        if len(found) != 1:
            return None, []
        return found[0], [("found_by_name", f"{name!r:.80} found as {found[0].relative_to(self.images_dir)}")]


def _fold(name: str) -> str:
    """Return a name in lower case and with one encoding of accents, for comparison."""
    return unicodedata.normalize("NFC", name).casefold()
