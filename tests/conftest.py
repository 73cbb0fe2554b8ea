"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from support import REFERENCE


def pytest_configure() -> None:
    torch.set_num_threads(1)  # small tensors; two test processes share two cores


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """Load the arrays of a reference file as tensors, by the file's name without its ending."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(a) for key, a in arrays.items() if a.dtype.kind in "fiu"}

    return load
