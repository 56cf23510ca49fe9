"""Write weights and checkpoints with torch.save, and verify that they read back.

A kill or a full disk never leaves half a file: the old file stays until the new one is complete.
"""

import errno
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from finestsam.errors import VALUE_ERRORS
from finestsam.runtime.whole_files import replacing

WRAPPERS = ("module", "_forward_module", "_orig_mod", "model", "sam")  # parts of names that are not SAM's


DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


class CheckpointNotSaved(OSError):
    """The disk is full or fails; the older file is whole, and training can go on.

    Args:
        reason: the `errno` of the system.
    """

    def __init__(self, text: str, reason: int | None = None):
        super().__init__(text)
        self.reason = reason

    @property
    def advice(self) -> str:
        """What the user should do before another try."""
        if self.reason in DISK_IS_FULL:
            return "make room there"
        return "allow this user to write there" if self.reason in NOT_ALLOWED else "see what is wrong with that disk"


def save_weights(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write a plain SAM state dict, which segment_anything's sam_model_registry loads on any machine."""
    save_file(path, {_unwrap_name(name): _plain_tensor(tensor) for name, tensor in state_dict.items()})


def _unwrap_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _plain_tensor(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    plain = tensor.detach().to("cpu", dtype).contiguous()
    # torch.save writes the whole storage of a view.
    return plain.clone() if plain.untyped_storage().nbytes() > plain.nbytes else plain


def save_file(path: Path, content: object, previous: Path | None = None) -> None:
    """Write a file with torch.save. It replaces the old one only when it is safely on the disk.

    Args:
        previous: the new name of the old file; None: it is deleted.

    Raises:
        CheckpointNotSaved: the disk is full or fails.
    """
    needed = int(1.1 * _count_bytes(content))
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with replacing(path, previous) as partial:
            _write_verified(partial, content)
    except (OSError, RuntimeError) as error:
        # torch says "unexpected pos 768 vs 662" while it handles the error of the disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointNotSaved(_describe_failure(cause, path.parent, needed), cause.errno) from None


def _count_bytes(content: object) -> int:
    """Return the bytes of the tensors in a file."""
    if isinstance(content, Tensor):
        return content.untyped_storage().nbytes()
    if isinstance(content, Mapping):
        return sum(_count_bytes(value) for value in content.values())
    return sum(map(_count_bytes, content)) if isinstance(content, list | tuple) else 0


def _write_verified(path: Path, content: object) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if path.stat().st_size != size or is_damaged(path):
        raise OSError(errno.EIO, "the file does not read back as it was written")


def is_damaged(path: Path) -> bool:
    """Whether the checksums of a file of torch.save are wrong; torch.load does not check them."""
    try:
        with zipfile.ZipFile(path) as archive:
            if list_packed(archive):
                return True
            has_checksums = any(member.CRC for member in archive.infolist())  # torch can leave them out
            return has_checksums and archive.testzip() is not None
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        RuntimeError,
        *VALUE_ERRORS,
    ):
        return True


def list_packed(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of compressed tensors; torch.save writes none. TorchScript's code is no tensor."""
    return [
        member.filename
        for member in archive.infolist()
        if member.compress_type != zipfile.ZIP_STORED
        and (member.filename.rpartition("/")[2] == "data.pkl" or "/data/" in member.filename)
    ]


def _describe_failure(error: OSError, folder: Path, needed: int) -> str:
    reason = error.strerror or error
    if error.errno in NOT_ALLOWED:  # free space does not matter
        return f"checkpoint not saved: {reason} (at {folder})"
    free = "nothing"
    with suppress(OSError):
        free = _format_size(shutil.disk_usage(folder).free)
    return f"checkpoint not saved: {reason} (need {_format_size(needed)}, free {free} at {folder})"


def _format_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
