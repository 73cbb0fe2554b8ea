"""Classifier-free guidance: label dropout in training, one batched forward in sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""D(x [B,C,H,W], sigma [B], labels [B] or None) -> estimate of the clean images [B,C,H,W]."""

NO_CLASS = -1


def drop_labels(labels: Tensor, probability: float) -> Tensor:
    """Replace each label [B] by "no class" with the given probability, so that the network learns both."""
    dropped = torch.rand(labels.shape, device=labels.device) < probability
    return labels.masked_fill(dropped, NO_CLASS)


class ClassifierFreeGuidance:
    """Wraps a denoiser: D_none + scale (D_class - D_none), both in one batch of twice the size (Ho & Salimans 2022).

    Scale 1 is the plain denoiser and costs no second half.
    """

    def __init__(self, denoise: Denoiser, scale: float = 1.0) -> None:
        self.denoise, self.scale = denoise, scale

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """x [B,C,H,W], sigma [B], labels [B] -> guided estimate [B,C,H,W]. Raises ValueError without labels."""
        if self.scale == 1:
            return self.denoise(x, sigma, labels)
        if labels is None:
            raise ValueError("guidance needs labels: there is no class to guide towards")
        both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
        conditional, unconditional = self.denoise(x.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return unconditional + self.scale * (conditional - unconditional)
