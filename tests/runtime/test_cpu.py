"""What a mode sets in its process; in processes of their own, as nothing takes it back."""

import subprocess
import sys

import pytest
import torch

# 1.2e-38 is the smallest normal float32. The first product starts the threads of torch's pool.
CODE = """
import threading, torch
from finestsam.runtime.cpu import set_processor
torch.set_num_threads(3)
tiny = torch.full((3_000_000,), 1e-39)
assert (tiny * 1).count_nonzero() == len(tiny)
set_processor()
def count():
    print(int((tiny * 1).count_nonzero()))
count()
later = threading.Thread(target=count)
later.start()
later.join()
"""


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="existing threads are counted on Linux alone")
def test_every_thread_flushes_denormals():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)

    assert [int(line) for line in run.stdout.split()] == [0, 0]
