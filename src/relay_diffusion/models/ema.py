"""Exponential moving average of a network's weights, with its half-life in images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """Exponential moving average of a network's parameters, in float32.

    `half_life_images`: images after which the weight of an old state has halved. `ramp_up`: upper limit of the
    half-life as a share of the images seen; None disables it. `weights`: the average to continue, by parameter name;
    empty starts from the network's parameters.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        half_life_images: float,
        ramp_up: float | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.half_life_images, self.ramp_up = half_life_images, ramp_up
        present = dict(network.named_parameters())
        self._parameters = present
        source = weights or present
        self.weights = {k: source[k].detach().to(p.device, torch.float32, copy=True) for k, p in present.items()}

    def half_life(self, seen: int) -> float:
        """Return the half-life in images after `seen` images.

        min(half_life_images, seen ramp_up).
        """
        return self.half_life_images if self.ramp_up is None else min(self.half_life_images, seen * self.ramp_up)

    def beta(self, batch: int, seen: int) -> float:
        """Return the weight of the old average in an update.

        After `batch` more images than `seen`: 0.5 ** (batch / max(half-life, 1e-8)).
        """
        return float(0.5 ** (batch / max(self.half_life(seen), 1e-8)))

    @torch.no_grad()
    def update(self, batch: int, seen: int) -> None:
        """Move the average towards the network after an optimizer step.

        `batch`: images of the step; `seen`: images before it.
        """
        present = [p if p.dtype == torch.float32 else p.float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), present, 1 - self.beta(batch, seen))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the EMA weights in the network during the block.

        The network's weights are restored afterwards.
        """
        raw = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            _copy(self.weights, self._parameters)
            yield
        finally:
            _copy(raw, self._parameters)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, torch.nn.Parameter]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name])
