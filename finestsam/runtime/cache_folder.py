"""Where finestsam keeps what can be made or fetched again."""

import os
from pathlib import Path

from finestsam.errors import UserError


def cache_folder() -> Path:
    """Return $FINESTSAM_CACHE, or finestsam/ in the user's cache folder. It may not exist yet.

    Raises:
        UserError: there is no home, as in containers that run under a number that belongs to nobody.
    """
    try:
        if own := os.environ.get("FINESTSAM_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finestsam"
    except RuntimeError:
        raise UserError(
            "no home folder is known to keep downloads and caches in: set FINESTSAM_CACHE to a folder"
        ) from None
