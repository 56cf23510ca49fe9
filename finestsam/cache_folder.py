"""Where finestsam keeps what can be made or fetched again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $FINESTSAM_CACHE, or finestsam/ in the user's cache folder. It may not exist yet."""
    if own := os.environ.get("FINESTSAM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finestsam"
