"""The logits of each object from the previous epoch, stored on disk.

Two files alternate: epoch e reads the file of epoch e - 1 and writes the other. So a run that is stopped in the middle
of an epoch and resumed reads the same logits again. The files are memory-mapped float16, 128 KB per object at 1024
pixels. Only objects that were trained on take disk space.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class PreviousLogits:
    """Rows of 4g x 4g logits, one per object of the training set.

    Args:
        folder: folder of the files, which all ranks and workers share.
        object_count: number of rows.
        side: 4g, a quarter of the model's image size.
    """

    def __init__(self, folder: Path, object_count: int, side: int):
        self.folder = folder
        self.shape = (object_count, side, side)

    def create(self) -> None:
        """Make missing files. Call it on one rank, before the others read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for parity in (0, 1):
            for path, bytes_per_row in (
                (self._path(parity), 2 * self.shape[1] * self.shape[2]),
                (self._marks(parity), 8),
            ):
                if not path.exists():
                    with path.open("wb") as file:
                        file.truncate(self.shape[0] * bytes_per_row)  # a sparse file: it takes no disk space yet

    def read(self, epoch: int, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return the logits of epoch `epoch` - 1, N x 1 x 4g x 4g, float32, and whether they exist, N, bool."""
        parity = (epoch - 1) % 2
        written_in = self._open_marks(parity, "r")[rows]
        logits = torch.from_numpy(self._open(parity, "r")[rows].astype(np.float32))[:, None]
        # A mark is the epoch + 1; 0: never written.
        return logits, torch.from_numpy((written_in == epoch) & (written_in > 0))

    def write(self, epoch: int, rows: list[int], logits: Tensor) -> None:
        """Write the logits (N x 4g x 4g) of the current epoch."""
        if rows:
            self._open(epoch % 2, "r+")[rows] = logits.detach().cpu().numpy().astype(np.float16)
            self._open_marks(epoch % 2, "r+")[rows] = epoch + 1

    def _open(self, parity: int, mode: str) -> np.memmap:
        return np.memmap(self._path(parity), dtype=np.float16, mode=mode, shape=self.shape)

    def _open_marks(self, parity: int, mode: str) -> np.memmap:
        return np.memmap(self._marks(parity), dtype=np.int64, mode=mode, shape=self.shape[:1])

    def _path(self, parity: int) -> Path:
        return self.folder / f"logits_{parity}.f16"

    def _marks(self, parity: int) -> Path:
        return self.folder / f"epochs_{parity}.i64"
