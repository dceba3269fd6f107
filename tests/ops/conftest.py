"""Fixtures for tests of kernels that do not run on this machine."""

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def without_data():
    with FakeTensorMode() as mode:
        yield mode
