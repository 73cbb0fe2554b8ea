"""Sampler interface, and precision and second-order update of the state."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser, check_label_tensor
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.diffusion.schedule import LogNormal
from relay_diffusion.diffusion.tensors import check_images

ROUNDING = 1 + 1e-9  # rounding error of sigma_min at the end of the grid


def state_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of a sampler's state: float64 where supported.

    Rounding errors of hundreds of small steps add up; Apple's GPUs have no float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def initial_state(start: Tensor, labels: Tensor | None) -> Tensor:
    """Convert the start [B,C,H,W] to the precision of the state.

    Raises ValueError unless `start` is a float tensor and `labels` is None or integers [B].
    """
    check_images("start", start)
    check_label_tensor(labels, len(start))
    return start.to(state_dtype(start.device))


def check_start(option: str, schedule: LogNormal, sigma: float) -> None:
    """Raise ValueError if `sigma` is beyond the end of the schedule.

    option: prefix of the message.
    """
    level = schedule.level(torch.tensor(sigma, dtype=torch.float64, device="cpu")).item()
    if level > 1:
        raise ValueError(
            f"{option}: sampling would start at sigma {sigma:.3f}, beyond the end of the corruption's schedule "
            f"(level {level:.3f} > 1, p_mean={schedule.p_mean}, p_std={schedule.p_std}); lower it or raise "
            f"prob_length={schedule.prob_length}"
        )


def stopped_levels(sigmas: list[float], sigma: float) -> list[float]:
    """Return the levels above `sigma`, then `sigma`.

    Raises ValueError unless it lies in [last, first).
    """
    if not sigmas[-1] <= sigma * ROUNDING < sigmas[0]:
        raise ValueError(f"cannot stop at sigma {sigma}: use {sigmas[-1]:g} to below {sigmas[0]:g}")
    return [*(level for level in sigmas if level > sigma * ROUNDING), sigma]


def second_order(both: Tensor, residual: Tensor, ratio: float) -> Tensor:
    """Compute the clean estimate of Heun's second-order step.

    All [B,C,H,W]. x - sigma (d + d')/2 with d = (x - x0^)/sigma and d' = (x' - x0^')/sigma', which is
    (both - ratio residual)/2 with both = x + x0^, residual = x' - x0^', ratio = sigma/sigma'.
    """
    return torch.sub(both, residual, alpha=ratio).mul_(0.5)


class Sampler(Protocol):
    """Sampler interface: start [B,C,H,W] -> images [B,C,H,W].

    All noise comes from `randn_like`.
    """

    @property
    def evaluations(self) -> int:
        """Network evaluations per image (without guidance)."""

    def __call__(self, denoise: Denoiser, start: Tensor, randn_like: RandnLike, labels: Tensor | None = None) -> Tensor:
        """Sample images of the labels [B] (-1 or None: no class)."""
