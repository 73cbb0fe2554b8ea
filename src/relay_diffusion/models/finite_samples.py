"""Detection of non-finite samples, and of the noise level where they appear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relay_diffusion.diffusion.guidance import Observer
from relay_diffusion.errors import UserError

SHOWN_SEEDS = 4  # number of seeds that a message lists
SAMPLER_FAILED = "although all estimates of the network are"


class NonFiniteSamplesError(UserError):
    """Samples with nan or infinity.

    The message names stage, seeds, noise level and remedy.
    """


def finite(images: Tensor) -> Tensor:
    """Return whether each image is finite: [B,C,H,W] -> bool [B].

    On the same device: one reduction without synchronization.
    """
    return torch.stack(torch.aminmax(images.flatten(1), dim=1)).isfinite().all(0)


def first_nonfinite_level(draw: Callable[[Sequence[Observer]], Tensor]) -> str | None:
    """Sample a batch again and describe its first non-finite tensor.

    draw: samples the batch with given observers. None if everything stayed finite. Synchronizes with the device at each
    step.
    """
    found: list[str] = []

    def check(x: Tensor, sigma: Tensor, estimate: Tensor) -> None:
        for what, images in (("the noisy image", x), ("the network's estimate", estimate)):
            if not found and not bool(finite(images).all()):
                found.append(f"first {what} at sigma={float(sigma[0]):.4g}")

    images = draw([check])
    if not found and not bool(finite(images).all()):
        found.append(SAMPLER_FAILED)
    return found[0] if found else None


def nonfinite_samples(
    stage: str, seeds: Sequence[int], finite: Sequence[bool], draw: Callable[[Sequence[Observer]], Tensor]
) -> NonFiniteSamplesError:
    """Build the error for a batch with non-finite samples.

    finite: bool [B]. draw: as in `first_nonfinite_level`.
    """
    where = first_nonfinite_level(draw) or "but not when sampled once more"
    lost = list(dict.fromkeys(seed for seed, fine in zip(seeds, finite, strict=True) if not fine))
    named = ", ".join(map(str, lost[:SHOWN_SEEDS]))
    named += f" and {len(lost) - SHOWN_SEEDS} more" if len(lost) > SHOWN_SEEDS else ""
    remedy = "use another checkpoint, or precision 32-true or bf16-mixed instead of 16-mixed"
    if where == SAMPLER_FAILED:
        remedy = "use other options of the sampler, or another sampler"
    return NonFiniteSamplesError(
        f"{stage}: the samples of seed{'s' if len(lost) > 1 else ''} {named} are not finite, {where}: {remedy}"
    )
