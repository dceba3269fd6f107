"""Fixtures for tests of kernels that do not run on this machine."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def free():
    """Without deterministic algorithms, which exclude some kernels."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def without_data():
    with FakeTensorMode() as mode:
        yield mode
