"""What tests import: paths, the toy denoiser of the reference vectors, replayed noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

REFERENCE = Path(__file__).parent / "reference"


def class_indices(one_hot: Tensor) -> Tensor:
    """One-hot labels [B,K] of the reference -> class indices [B]."""
    assert bool((one_hot.sum(1) == 1).all())
    return one_hot.argmax(1)


def toy_denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """The denoiser of the reference vectors; labels are class indices of 10 classes, -1 for none."""
    one_hot_mean = 0.0 if labels is None else (labels.clamp(min=0) / 10)[:, None, None, None]
    return (
        x / (1 + sigma[:, None, None, None] ** 2) + 0.1 * torch.sin(3 * x.roll(1, -1)) + 0.05 * one_hot_mean
    )


class Replay:
    """A noise source that hands out recorded draws in order."""

    def __init__(self, draws: Tensor | list[Tensor]) -> None:
        self.draws: Iterator[Tensor] = iter(draws)

    def randn_like(self, x: Tensor) -> Tensor:
        draw = next(self.draws)
        assert draw.shape == x.shape
        return draw.to(x.dtype)

    def skip(self) -> None:
        next(self.draws)

    @property
    def left(self) -> int:
        return len(list(self.draws))
