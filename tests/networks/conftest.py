"""Fixtures of the tests of networks."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    """Convolutions of float32 round alike in each call: without TF32, and without sums whose order varies (atomics)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
