import pytest
import torch

from finestsam.runtime.hardware import Hardware, find_hardware


@pytest.mark.parametrize("num_devices", ["auto", -1, 1, 2, [0], [3, 5]])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_trains_on_its_cpu(num_devices):
    assert find_hardware(num_devices, num_nodes=2) == Hardware("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_memory_of_a_single_gpu_is_known():
    found = find_hardware([0], num_nodes=1)

    assert found == Hardware("cuda", 1, torch.cuda.get_device_properties(0).total_memory)
    assert find_hardware([0], num_nodes=2) == Hardware("cuda", 2)
