"""Guidance as wrappers of a denoiser, independent of the sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relay_diffusion.diffusion.text_states import TextStates

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""D(x [B,C,H,W], sigma [B], labels [B] or None) -> estimate of the clean images [B,C,H,W]."""

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with the noisy images [B,C,H,W], sigma [B] and the estimate [B,C,H,W] of each evaluation.

Copy what you keep: the next evaluation may reuse the memory.
"""

NO_CLASS = -1


def observed(denoise: Denoiser, observers: Sequence[Observer]) -> Denoiser:
    """Return a denoiser that shows each evaluation to observers."""
    if not observers:
        return denoise

    def evaluate(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        estimate = denoise(x, sigma, labels)
        for observe in observers:
            observe(x, sigma, estimate)
        return estimate

    return evaluate


def drop_conditions(labels: Tensor, text: TextStates | None, probability: float) -> tuple[Tensor, TextStates | None]:
    """Remove class and text of each image with the given probability.

    labels [B], text: B rows or None. The same images lose both, so the network learns the conditional and the
    unconditional estimate.
    """
    dropped = torch.rand(labels.shape, device=labels.device) < probability
    return labels.masked_fill(dropped, NO_CLASS), None if text is None else text.drop(dropped)


def check_label_tensor(labels: Tensor | None, count: int) -> None:
    """Raise ValueError unless labels are None or integers [count].

    Values are not checked.
    """
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels is {type(labels).__name__}: must be a tensor of class indices [{count}], or None")
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if labels.shape != (count,) or not whole:
        raise ValueError(
            f"labels is {labels.dtype} of shape {tuple(labels.shape)}: must be integers [{count}], one for each image"
        )


def check_guidance(scale: float, interval: Sequence[float] | None) -> None:
    """Raise ValueError unless guidance scale and interval are valid.

    `scale` is a finite number, `interval` None or [lowest sigma, highest sigma].
    """
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale={scale!r}: must be a finite number")
    if interval is not None and not (
        isinstance(interval, Sequence)
        and len(interval) == 2
        and all(isinstance(sigma, int | float) for sigma in interval)
        and 0 <= interval[0] <= interval[1]
    ):
        raise ValueError(f"guidance_interval={interval}: must be [lowest sigma, highest sigma], or null")


class ClassifierFreeGuidance:
    """Classifier-free guidance: D_none + scale (D_class - D_none).

    Both estimates are one batch of twice the size (Ho & Salimans 2022). Scale 1 evaluates the plain denoiser only.
    """

    def __init__(self, denoise: Denoiser, scale: float = 1.0) -> None:
        self.denoise, self.scale = denoise, scale

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the guided estimate [B,C,H,W].

        x [B,C,H,W], sigma [B], labels [B]. Raises ValueError without labels.
        """
        if self.scale == 1:
            return self.denoise(x, sigma, labels)
        if labels is None:
            raise ValueError(
                "labels=None: guidance needs class labels or text; give labels [B] or text, or use guidance_scale=1"
            )
        both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
        conditional, unconditional = self.denoise(x.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


class AutoGuidance:
    """Guidance with a weaker denoiser: D_guide + scale (D - D_guide).

    Autoguidance, Karras et al. 2024, eq. 3. The guide gets the same labels. Scale 1 evaluates the plain denoiser only.
    """

    def __init__(self, denoise: Denoiser, guide: Denoiser, scale: float = 1.0) -> None:
        self.denoise, self.guide, self.scale = denoise, guide, scale

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the guided estimate [B,C,H,W].

        x [B,C,H,W], sigma [B], labels [B] or None.
        """
        denoised = self.denoise(x, sigma, labels)
        if self.scale == 1:
            return denoised
        weaker = self.guide(x, sigma, labels)
        return weaker + self.scale * (denoised - weaker)


class GuidanceInterval:
    """Guidance limited to low <= sigma <= high (Kynkaanniemi et al. 2024).

    Outside the interval only the plain denoiser is evaluated. Samplers pass sigma on the CPU, so the choice needs no
    synchronization with the device. Raises ValueError for an empty or negative interval.
    """

    def __init__(self, plain: Denoiser, guided: Denoiser, low: float = 0.0, high: float = math.inf) -> None:
        if not 0 <= low <= high:
            raise ValueError(f"guidance_interval=[{low}, {high}]: is empty or negative; use 0 <= low <= high")
        self.plain, self.guided, self.low, self.high = plain, guided, low, high

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the estimate [B,C,H,W].

        x [B,C,H,W], sigma [B], labels [B] or None.
        """
        inside = (self.low <= sigma) & (sigma <= self.high)
        if bool(inside.all()):
            return self.guided(x, sigma, labels)
        plain = self.plain(x, sigma, labels)
        if not bool(inside.any()):
            return plain
        return torch.where(inside.to(x.device)[:, None, None, None], self.guided(x, sigma, labels), plain)


def with_guidance(
    plain: Denoiser,
    scale: float,
    interval: Sequence[float] | None = None,
    guide: Denoiser | None = None,
    conditional: bool = True,
) -> Denoiser:
    """Wrap a denoiser with autoguidance or classifier-free guidance.

    Autoguidance if `guide` is given. Scale 1 disables guidance for any interval. `interval`: the noise levels with
    guidance; None: all. `conditional`: whether the network has classes or text.
    Raises ValueError for a guide at scale 1, or another scale for an unconditional network without guide.
    """
    if scale == 1:
        if guide is not None:
            raise ValueError("guidance_scale=1 disables guidance: remove guide, or choose another scale, e.g. 2")
        return plain
    if guide is None and not conditional:
        raise ValueError(
            f"guidance_scale={scale}, but the network is unconditional and there is no guide: "
            "use guidance_scale=1 or give a guide"
        )
    whole = ClassifierFreeGuidance(plain, scale) if guide is None else AutoGuidance(plain, guide, scale)
    return whole if interval is None else GuidanceInterval(plain, whole, *interval)
