"""The finished images of a prediction, one line each, so that an interrupted prediction can go on.

The folder is locked meanwhile. Each line also marks its weights and settings, because some disks have no locks.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from finestsam.errors import UserError, printable
from finestsam.runtime.whole_files import write_text

JOURNAL_NAME = ".predictions.jsonl"


class Journal:
    """Entries of images, as `Results` makes them, in a file that is removed when the results are written.

    Args:
        folder: of the results.
        origin: the weights and settings that the entries depend on.
    """

    def __init__(self, folder: Path, origin: dict[str, Any]):
        self.path = folder / JOURNAL_NAME
        self._first_line = json.dumps({"origin": origin}, sort_keys=True, allow_nan=False)
        self._mark = hashlib.blake2b(self._first_line.encode(), digest_size=8).hexdigest()

    def begin(self, entries: list[dict]) -> None:
        """Start a new file, with the entries that are kept from an earlier one."""
        write_text(self.path, "\n".join([self._first_line, *map(self._to_line, entries), ""]))

    def add(self, entry: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._to_line(entry) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def read(self) -> list[dict] | None:
        """Return the entries of an earlier process; None where there is no journal.

        Raises:
            UserError: they are of other weights or settings.
        """
        if not self.path.is_file():
            return None
        first, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        if first != self._first_line:
            raise UserError(f"--resume: {printable(self.path.parent)} was predicted with other weights or settings")
        entries = []
        for line in lines:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue  # cut short when the process was ended, or the end of the file
            if isinstance(content, dict) and content.pop("origin", None) == self._mark and _is_entry(content):
                entries.append(content)
        return entries

    def _to_line(self, entry: dict) -> str:
        return json.dumps({"origin": self._mark} | entry, allow_nan=False)


def _is_entry(content: dict) -> bool:
    image, annotations = content.get("image"), content.get("annotations")
    if not isinstance(image, dict) or not isinstance(annotations, list):
        return False
    return isinstance(image.get("file_name"), str) and all(isinstance(entry, dict) for entry in annotations)


def read_finished(path: Path, origin: dict[str, Any]) -> list[dict]:
    """Return the entries of a finished predictions.json; none where there is no such file.

    Raises:
        UserError: it is of other weights or settings, or not written by finestsam.
    """
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["info"]["origin"] != json.loads(json.dumps(origin, allow_nan=False)):
            raise UserError(f"--resume: {printable(path)} was predicted with other weights or settings")
        entries = {image["id"]: {"image": image, "annotations": []} for image in content["images"]}
        for annotation in content["annotations"]:
            entries[annotation["image_id"]]["annotations"].append(annotation)
        if not all(map(_is_entry, entries.values())):
            raise ValueError("an entry of another kind")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"--resume: {printable(path)} is not as finestsam wrote it; choose another --out_dir") from None
    return list(entries.values())
