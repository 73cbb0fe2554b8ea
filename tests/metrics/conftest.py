"""The network is built once for all tests of the metrics."""

from __future__ import annotations

import pytest

from relay_diffusion.metrics import Inception


@pytest.fixture(scope="session")
def inception() -> Inception:
    return Inception()
