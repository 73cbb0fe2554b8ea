"""Fixtures of the tests of networks."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    """Convolutions of float32 do not round to TF32, which cuDNN may choose for one call and not for another."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
