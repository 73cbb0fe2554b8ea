"""Fixtures of tests of callbacks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from relay_diffusion.models.stage import DiffusionStage


@pytest.fixture
def fit(fit: Callable[..., DiffusionStage]) -> Callable[..., DiffusionStage]:
    """Train a stage whose network has one level: callbacks do the same with any network."""
    return lambda directory, images, *overrides, **stage: fit(
        directory, images, "network.channel_mult=[1]", *overrides, **stage
    )
