"""Detect non-finite samples on the device, and find the noise level of the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.errors import UserError
from relay_diffusion.samplers import Sampler

SHOWN_SEEDS = 4  # a message names so many


class NonFiniteSamplesError(UserError):
    """Samples that hold nan or infinity; the message names stage, seeds, sigma and remedy."""


def finite(images: Tensor) -> Tensor:
    """Whether each image is finite: [B,C,H,W] -> bool [B] on the same device. One reduction, no synchronization."""
    return torch.stack(torch.aminmax(images.flatten(1), dim=1)).isfinite().all(0)


def first_nonfinite(sampler: Sampler, draw: Callable[[Callable[..., Tensor]], Tensor]) -> str | None:
    """Draw a batch once more; describe the first state or estimate that is not finite.

    draw: samples the batch with another sampler. None if everything stayed finite. Waits for the device at each step.
    """
    found: list[str] = []

    def check(what: str, images: Tensor, sigma: Tensor) -> None:
        if not found and not bool(finite(images).all()):
            found.append(f"first {what} at sigma={float(sigma[0]):.4g}")

    def checked(denoise: Denoiser, *inputs: Any) -> Tensor:
        def checked_denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            check("the noisy image", x, sigma)
            estimates = denoise(x, sigma, labels)
            check("the network's estimate", estimates, sigma)
            return estimates

        return sampler(checked_denoise, *inputs)

    draw(checked)
    return found[0] if found else None


def nonfinite_samples(
    stage: str,
    seeds: Sequence[int],
    finite: Sequence[bool],
    sampler: Sampler,
    draw: Callable[[Callable[..., Tensor]], Tensor],
) -> NonFiniteSamplesError:
    """Build the error for a batch in which some samples are not `finite` [B]; `draw` as in `first_nonfinite`."""
    where = first_nonfinite(sampler, draw) or "but not when sampled once more"
    lost = list(dict.fromkeys(seed for seed, fine in zip(seeds, finite, strict=True) if not fine))
    named = ", ".join(map(str, lost[:SHOWN_SEEDS]))
    named += f" and {len(lost) - SHOWN_SEEDS} more" if len(lost) > SHOWN_SEEDS else ""
    return NonFiniteSamplesError(
        f"{stage}: the samples of seed{'s' if len(lost) > 1 else ''} {named} are not finite, {where}: use another "
        "checkpoint, or precision 32-true or bf16-mixed if it was 16-mixed"
    )
