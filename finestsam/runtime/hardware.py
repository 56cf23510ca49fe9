"""The devices that a run would train on."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """What a run trains on."""

    kind: str  # as torch names it: cpu, cuda, mps
    count: int = 1  # devices on all machines
    memory_bytes: int = 0  # of the device, where it is the only one


def find_hardware(num_devices: int | list[int] | str, num_nodes: int) -> Hardware:
    """Return the GPUs that a run would take, or the CPU where there is none.

    Args:
        num_devices: number of devices, or their indices; "auto" and -1: all.
    """
    import torch  # takes seconds, and help does not need it

    if not torch.cuda.is_available():
        return Hardware("cpu")
    available = torch.cuda.device_count()
    devices = num_devices if isinstance(num_devices, list) else list(range(_count(num_devices, available)))
    # A launcher such as torchrun starts one process per device; each process then sees its own device alone.
    count = max(len(devices) * num_nodes, int(os.environ.get("WORLD_SIZE", 1)))
    if count > 1 or not devices or not 0 <= devices[0] < available:
        return Hardware("cuda", count)  # without its memory: after reading that, processes cannot be forked
    return Hardware("cuda", 1, torch.cuda.get_device_properties(devices[0]).total_memory)


def _count(num_devices: int | str, available: int) -> int:
    return available if num_devices in ("auto", -1) else min(num_devices, available)
