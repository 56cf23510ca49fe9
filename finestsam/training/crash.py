"""Keep what is needed to find one of our own bugs, in the folder of the run that met it."""

import dataclasses
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import lightning
import torch
import yaml

from finestsam import __version__
from finestsam.errors import UserError
from finestsam.training.run import Run
from finestsam.training.run_folder import RunFolder
from finestsam.training.state import Progress, RunState

CRASH_NAME = "crash.txt"
# What gloo and NCCL say on a rank whose peer has gone.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")


@contextmanager
def note_crash(run: Run, state: RunState, folder: RunFolder) -> Iterator[None]:
    """Write an error that nobody expected into `crash.txt`, with settings and versions, and let it go on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if run.ranks.count > 1 and any(text in str(error) for text in LOST_PEER):
            raise  # the rank that failed has its own to write
        path = folder.path / CRASH_NAME
        with suppress(OSError):
            path.write_text(_describe(run, state.progress, error), encoding="utf-8")
            print(f"finestsam: stopped by an error of its own; {path} holds what to report", file=sys.stderr)
        raise


def _describe(run: Run, progress: Progress, error: Exception) -> str:
    versions = f"finestsam {__version__}, torch {torch.__version__}, lightning {lightning.__version__}"
    system = f"Python {platform.python_version()}, {platform.platform()}, {run.fabric.device}"
    place = f"rank {run.ranks.rank} of {run.ranks.count}, epoch {progress.epoch}, step {progress.step}"
    settings = yaml.safe_dump(dataclasses.asdict(run.config), sort_keys=False)
    trace = "".join(traceback.format_exception(error))
    return f"{versions}\n{system}\n{place}\n\n{trace}\n{settings}"
