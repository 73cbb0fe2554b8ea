"""Detect non-finite samples on the device, and find the noise level of the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.errors import UserError
from relay_diffusion.samplers import Sampler

SHOWN_SEEDS = 4  # a message names so many


class NonFiniteSamplesError(UserError):
    """Samples that hold nan or infinity; the message names stage, seeds, sigma and remedy."""


def finite(images: Tensor) -> Tensor:
    """Whether each image is finite: [B,C,H,W] -> bool [B] on the same device. One reduction, no synchronization."""
    return torch.stack(torch.aminmax(images.flatten(1), dim=1)).isfinite().all(0)


class _Stopped(Exception):  # noqa: N818  # no error: it carries what was found out of a sampler
    pass


class StopAtNonFinite:
    """A sampler that stops at the first state or estimate that is not finite, and waits for the device to see it.

    `found` says what and at which noise level; None if everything stayed finite.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.found: str | None = None

    @property
    def evaluations(self) -> int:
        """Network evaluations for one image (without guidance)."""
        return self.sampler.evaluations

    def __call__(self, denoise: Denoiser, start: Tensor, randn_like: RandnLike, labels: Tensor | None = None) -> Tensor:
        """The sampler's images of `start` [B,C,H,W], or `start` if it was stopped."""

        def watched(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            self._check("the noisy image", x, sigma)
            estimates = denoise(x, sigma, labels)
            self._check("the network's estimate", estimates, sigma)
            return estimates

        try:
            return self.sampler(watched, start, randn_like, labels)
        except _Stopped:
            return start

    def _check(self, what: str, images: Tensor, sigma: Tensor) -> None:
        if not bool(finite(images).all()):
            self.found = f"first {what} at sigma={float(sigma[0]):.4g}"
            raise _Stopped


def nonfinite_samples(
    stage: str, seeds: Sequence[int], finite: Sequence[bool], sampler: Sampler, draw: Callable[[Sampler], Tensor]
) -> NonFiniteSamplesError:
    """The error for a batch in which some samples are not `finite` [B].

    draw: samples the batch once more with another sampler, to find the noise level.
    """
    watched = StopAtNonFinite(sampler)
    draw(watched)
    where = watched.found or "but not when sampled once more"
    lost = list(dict.fromkeys(seed for seed, fine in zip(seeds, finite, strict=True) if not fine))
    named = ", ".join(map(str, lost[:SHOWN_SEEDS]))
    named += f" and {len(lost) - SHOWN_SEEDS} more" if len(lost) > SHOWN_SEEDS else ""
    return NonFiniteSamplesError(
        f"{stage}: the samples of seed{'s' if len(lost) > 1 else ''} {named} are not finite, {where}: use another "
        "checkpoint, or precision 32-true or bf16-mixed if it was 16-mixed"
    )
