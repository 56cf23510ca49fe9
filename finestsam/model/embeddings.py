"""The embedding store: a frozen encoder's embeddings of images, kept on disk in float16 and found by content.

Each image has one memory-mapped file, in a folder per encoder. Any number of processes may read and fill the store at
once. Files appear whole, and an interrupted run goes on where it stopped. A checksum follows the numbers: a file that
was changed since is removed and made again. float16 changes an embedding by 2e-4 relative and the decoder's gradient by
8e-6, less than another order of summation does.
"""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from finestsam.errors import printable
from finestsam.runtime.whole_files import remove_unfinished, replacing

GIGABYTE = 1_000_000_000
# Left free on the disk for other programs.
SPARED_BYTES = 2 * GIGABYTE
CHECKSUM_BYTES = 16


@dataclass
class EmbeddingStore:
    """Embeddings of one encoder. It only saves time: after a disk error, printed once, nothing more is stored.

    Args:
        folder: of all encoders; made when the first embedding is written.
        encoder_key: a hash of weights, preprocessing and precision.
        shape: of an embedding, (C, g, g).
        max_bytes: of all encoders together; the least recently used go first.
    """

    folder: Path
    encoder_key: str
    shape: tuple[int, int, int]
    max_bytes: int
    is_writable: bool = field(default=True, init=False)  # false after the first disk error
    _sound: set[str] = field(default_factory=set, init=False)  # keys whose files this process has verified

    @property
    def entry_bytes(self) -> int:
        """Return the size of a file."""
        return 2 * int(np.prod(self.shape)) + CHECKSUM_BYTES

    def read(self, key: str) -> np.ndarray | None:
        """Return the embedding of an image, C x g x g, float16, mapped from the disk; None where it is not there.

        A damaged file is removed.
        """
        path = self._find(key)
        try:
            if path.stat().st_size != self.entry_bytes:
                return None
            embedding = np.memmap(path, dtype=np.float16, mode="r", shape=self.shape)
            if key not in self._sound and not self._verify(key, path, embedding):
                return None
            return embedding
        except OSError:
            return None

    def _verify(self, key: str, path: Path, embedding: np.ndarray) -> bool:
        with path.open("rb") as file:
            file.seek(-CHECKSUM_BYTES, os.SEEK_END)
            checksum = file.read()
        if checksum != self._checksum(key, embedding.tobytes()) or not np.isfinite(embedding).all():
            print(f"finestsam: {printable(path)} was damaged since it was written; it is made again", file=sys.stderr)
            with suppress(OSError):
                path.unlink()
            return False
        self._sound.add(key)
        return True

    def _checksum(self, key: str, content: bytes) -> bytes:
        """Return the checksum that ties the numbers to this image and this encoder."""
        seed = f"{self.encoder_key} {key} {self.shape} ".encode()
        return hashlib.blake2b(seed + content, digest_size=CHECKSUM_BYTES).digest()

    def holds(self, key: str) -> bool:
        """Whether the embedding of an image is there."""
        try:
            return self._find(key).stat().st_size == self.entry_bytes
        except OSError:
            return False

    def write(self, key: str, embedding: np.ndarray) -> None:
        """Store the embedding of an image, C x g x g, unless float16 overflows or the disk fails."""
        with np.errstate(over="ignore"):
            embedding = embedding.astype(np.float16)
        if not self.is_writable or not np.isfinite(embedding).all():
            return
        path = self._find(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, is_lasting=False) as partial:
                content = embedding.tobytes()
                partial.write_bytes(content + self._checksum(key, content))
        except OSError as error:
            self._give_up(error)

    def make_room(self, wanted: Iterable[str]) -> int:
        """Make room for the wanted images; return how many of the missing ones fit.

        The least recently used files are removed first, wanted ones never. 0 where the folder cannot be written.
        """
        if not self.is_writable:
            return 0
        try:
            room = self._make_room(set(map(self._find, wanted)))
            if room:
                self._check_writable()
            return room
        except OSError as error:
            self._give_up(error)
            return 0

    def _make_room(self, wanted_paths: set[Path]) -> int:
        for folder in self.folder.glob("*/*"):
            remove_unfinished(folder)
        held = {path for path in wanted_paths if path.exists()}
        for path in held:
            with suppress(OSError):  # another user's file, which can still be read
                os.utime(path)
        entries = sorted((status.st_mtime, status.st_size, path) for path, status in self._list_entries())
        used = sum(size for _, size, _ in entries)
        needed = (len(wanted_paths) - len(held)) * self.entry_bytes
        excess = used + needed - self.max_bytes
        for _, size, path in entries:
            if excess <= 0:
                break
            if path not in wanted_paths:
                path.unlink(missing_ok=True)
                used, excess = used - size, excess - size
        room = min(self.max_bytes - used, self._count_free_bytes())
        return max(0, min(len(wanted_paths) - len(held), room // self.entry_bytes))

    def _check_writable(self) -> None:
        folder = self.folder / self.encoder_key
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    def _give_up(self, error: OSError) -> None:
        """Stop writing; existing files are still read."""
        self.is_writable = False
        reason = f"{printable(self.folder)} cannot be written: {error.strerror or error}"
        print(f"finestsam: embeddings are not kept, {reason} (store.folder)", file=sys.stderr)

    def _find(self, key: str) -> Path:
        return self.folder / self.encoder_key / key[:2] / f"{key}.f16"

    def _list_entries(self) -> Iterable[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("*/*/*.f16"):
            try:
                yield path, path.stat()
            except OSError:
                continue  # another process has removed it

    def _count_free_bytes(self) -> int:
        folder = self.folder
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free - SPARED_BYTES


def image_key(digest: str, size: tuple[int, int], variant: str = "") -> str:
    """Return the key of an image's embedding.

    Args:
        digest: as `ImageFacts.digest` has it.
        size: (height, width) as it was read: one file can be read upright and as it is stored.
        variant: of a fixed augmentation, empty for the plain image.
    """
    return hashlib.blake2b(f"{digest} {size[0]} {size[1]} {variant}".encode(), digest_size=16).hexdigest()
