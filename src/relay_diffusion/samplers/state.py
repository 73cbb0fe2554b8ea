"""A sampler's running state: its precision, and the estimate that a second-order step moves it with."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it: hundreds of small steps add up (Apple's GPUs have none)."""
    return torch.float32 if device.type == "mps" else torch.float64


def second_order(both: Tensor, residual: Tensor, ratio: float) -> Tensor:
    """The clean images that the mean of the slopes at both ends of a step points to (Heun), all [B,C,H,W].

    x - sigma (d + d')/2 with d = (x - x0^)/sigma and d' = (x' - x0^')/sigma', that is (both - ratio residual)/2 with
    both = x + x0^, residual = x' - x0^', ratio = sigma/sigma'.
    """
    return torch.sub(both, residual, alpha=ratio).mul_(0.5)
