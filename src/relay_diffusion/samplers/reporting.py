"""Reports of a sampler's network evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.samplers import Sampler


def reporting(sampler: Sampler, report: Callable[[], None]) -> Callable[..., Tensor]:
    """Return the sampler with a call of `report` after each evaluation.

    On a GPU the evaluation is launched by then, not finished.
    """

    def reported(denoise: Denoiser, *inputs: Any) -> Tensor:
        def evaluate(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            estimates = denoise(x, sigma, labels)
            report()
            return estimates

        return sampler(evaluate, *inputs)

    return reported
