import pytest
from conformance_zoo import Zoo


@pytest.fixture
def zoo(tmp_path, capsys) -> Zoo:
    return Zoo(tmp_path, capsys)
