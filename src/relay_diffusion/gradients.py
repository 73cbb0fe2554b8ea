"""Gradients: those that are not finite are replaced, as published, instead of spoiling the weights; their norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from relay_diffusion.kernels import HAVE_TRITON

GRADIENT_LIMIT = 1e5  # what an infinite gradient becomes, as published


def replace_nonfinite(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Set gradients that are NaN to 0 and infinite ones to +-1e5, in place; the number of them, on the device.

    On a GPU one kernel reads all gradients once, and writes only what it replaces.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.int64)
    if HAVE_TRITON and all(gradient.is_cuda and _walkable(gradient) for gradient in gradients):
        from relay_diffusion.kernels.nonfinite import replace_all

        return replace_all(gradients, GRADIENT_LIMIT)
    counts = [gradient.isfinite().logical_not_().sum() for gradient in gradients]
    for gradient in gradients:
        torch.nan_to_num_(gradient, nan=0.0, posinf=GRADIENT_LIMIT, neginf=-GRADIENT_LIMIT)
    return torch.stack(counts).sum()


def keep_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """How an optimizer computes its step is this run's choice, not that of the run whose state is loaded."""
    if "fused" not in optimizer.defaults:
        return state
    fused = optimizer.defaults["fused"]
    return state | {"param_groups": [group | {"fused": fused} for group in state["param_groups"]]}


class GradientNorm:
    """Mean over optimizer steps of the L2 norm of all gradients; summed where they are, so no step waits for it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of the norms, and how many

    def add(self, parameters: Iterable[torch.nn.Parameter], taken: Tensor | None = None) -> None:
        """Count a step's gradients; `taken`, a bool on the device, says whether the step will take place."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        norm = torch.nn.utils.get_total_norm(gradients).float()
        step = torch.stack([norm, torch.ones_like(norm)])
        step = step if taken is None else torch.where(taken.to(step.device), step, 0.0)
        self._sums = step if self._sums is None else self._sums + step

    def take(self) -> float | None:
        """The mean since the last call; None if there was no step."""
        total, steps = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        self._sums = None
        return total / steps if steps else None


def _walkable(gradient: Tensor) -> bool:
    """Whether it is float32 and its memory can be walked through from end to end, in whatever order."""
    last = gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
    return gradient.dtype == torch.float32 and (last or gradient.is_contiguous())
