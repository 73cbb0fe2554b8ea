"""EDM preconditioning, which makes a network a denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from relay_diffusion.diffusion.guidance import NO_CLASS, check_label_tensor
from relay_diffusion.diffusion.tensors import check_images, noise_levels
from relay_diffusion.diffusion.text_states import TextStates, concatenate, no_text
from relay_diffusion.networks.unet import UNet


class Condition(NamedTuple):
    """Conditioning images [B,K,H,W] and their noise levels sigma [B]."""

    images: Tensor
    level: Tensor


class Prompts(NamedTuple):
    """Classes and text of the images of a batch.

    labels [B] or None; text: B rows; negative: text of the unconditional estimate of guidance, one row; None: no
    text.
    """

    labels: Tensor | None
    text: TextStates
    negative: TextStates | None = None


class EDMPreconditioner(nn.Module):
    """Denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise, labels) (Karras et al. 2022, section 5).

    Raises ValueError for sigma_data out of range.
    """

    __call__: Callable[..., Tensor]  # torch types Module.__call__ as returning Any

    def __init__(self, network: UNet, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data={sigma_data}: must be positive and finite")
        self.network, self.sigma_data = network, sigma_data

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        condition: Condition | None = None,
        text: TextStates | None = None,
    ) -> Tensor:
        """Return the estimate of x0 [B,C,H,W], float32.

        x [B,C,H,W], sigma [B] (may be on the CPU) or a number, labels [B] or None, augment_labels [B,A] or None. A
        condition is scaled by the c_in of its own noise level. text: B rows or None. Raises ValueError for integer
        images, and if the number of noise levels, labels or texts differs from that of images.
        """
        check_images("x", x)
        check_label_tensor(labels, len(x))
        x, sigma = x.float(), noise_levels(sigma, len(x)).float()
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        scales = torch.stack([c_skip, c_out, 1 / total.sqrt(), sigma.log() / 4]).to(x.device, non_blocking=True)
        c_skip, c_out, c_in = scales[:3, :, None, None, None]
        with torch.cuda.device_of(x):  # Triton launches on the current device
            seen, level = c_in * x, None
            if condition is not None:
                level = condition.level.float().to(x.device, non_blocking=True)
                c_condition = (level**2 + self.sigma_data**2).rsqrt()[:, None, None, None]
                seen = torch.cat([seen, c_condition * condition.images.float()], dim=1)
            f = self.network(seen, scales[3], labels, augment_labels, level, text)
        return torch.addcmul(c_skip * x, c_out, f.float())


class Conditioned:
    """Denoiser with a fixed condition for each image of a batch.

    Guidance may evaluate the batch several times at once: the condition is repeated. Evaluations are not replayed from
    a CUDA graph, which would keep the condition of its capture.
    """

    def __init__(self, denoiser: EDMPreconditioner, condition: Condition) -> None:
        self.denoiser, self.condition = denoiser, condition

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None, text: TextStates | None = None) -> Tensor:
        """Return the estimate of x0, float32, for n copies of the batch.

        x [n B,C,H,W], sigma [n B], labels [n B] or None, text: n B rows or None; the condition is repeated n times.
        """
        images, level = self.condition
        times = len(x) // len(images)
        repeated = Condition(images.repeat(times, 1, 1, 1), level.repeat(times))
        return self.denoiser(x, sigma, labels, None, repeated, text)


class Prompted:
    """Denoiser whose labels are indices of images, for their class and text.

    Samplers, guidance and tiles pass labels on without their meaning. So text needs nothing in any of them: this
    wrapper, below all others, replaces the index of an image by its class and text, and NO_CLASS by no class and the
    negative prompt.
    """

    def __init__(self, denoiser: Callable[..., Tensor], prompts: Prompts) -> None:
        text, negative = prompts.text, prompts.negative
        if negative is None:
            negative = no_text(1, text.tokens.shape[2], text.tokens.device)
        self.denoiser, self.labels = denoiser, prompts.labels
        self.images = len(text.tokens)
        self.text = concatenate([text, negative])

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the estimate of x0, float32, for n copies of the batch.

        x [n B,C,H,W], sigma [n B], labels [n B]: indices of images, or NO_CLASS; None: NO_CLASS for all.
        """
        index = torch.full((len(x),), NO_CLASS, device=x.device) if labels is None else labels
        without = index < 0
        classes = None
        if self.labels is not None:
            classes = self.labels[index.clamp(min=0)].masked_fill(without, NO_CLASS)
        rows = index.masked_fill(without, self.images)
        return self.denoiser(x, sigma, classes, text=self.text.select(rows))
