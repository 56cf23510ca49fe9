"""What a mode sets in its process; in processes of their own, as nothing takes it back."""

import subprocess
import sys

import pytest
import torch

# 1.2e-38 is the smallest normal float32. The first product starts the threads of torch's pool.
CODE = """
import threading, torch
from finestsam.config import build_config
from finestsam.runtime.cpu import set_processor
torch.set_num_threads(3)
tiny = torch.full((3_000_000,), 1e-39)
assert (tiny * 1).count_nonzero() == len(tiny)
set_processor(build_config({"flush_denormals": %s}))
def count():
    print(int((tiny * 1).count_nonzero()))
count()
later = threading.Thread(target=count)
later.start()
later.join()
"""


def count_denormals(flushes):
    run = subprocess.run([sys.executable, "-c", CODE % flushes], capture_output=True, text=True, check=True)
    return [int(line) for line in run.stdout.split()]


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")
@pytest.mark.parametrize(("flushes", "left"), [(True, 0), (False, 3_000_000)])
def test_every_thread_flushes_denormals_where_prompted(flushes, left):
    if flushes and not sys.platform.startswith("linux"):
        pytest.skip("existing threads are counted on Linux alone")
    assert count_denormals(flushes) == [left, left]
