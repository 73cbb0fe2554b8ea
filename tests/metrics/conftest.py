"""Build the network once for all tests of the metrics."""

from __future__ import annotations

import pytest

from fake_inception import use_small_features
from relay_diffusion.metrics import Inception


@pytest.fixture(scope="session")
def inception() -> Inception:
    return Inception()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few features, so that files and eigenvalues are cheap."""
    use_small_features(monkeypatch)
