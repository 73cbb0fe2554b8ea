"""EDM preconditioning: from a network to a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relay_diffusion.networks.unet import UNet


class EDMPreconditioner(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise, labels) (Karras et al. 2022, section 5)."""

    def __init__(self, network: UNet, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x [B,C,H,W], sigma [B], labels [B] or None, augment_labels [B,A] or None -> estimate of x0, float32.

        sigma may lie on the CPU, where a sampler keeps it.
        """
        x, sigma = x.float(), sigma.float()
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        scales = torch.stack([c_skip, c_out, 1 / total.sqrt(), sigma.log() / 4]).to(x.device, non_blocking=True)
        c_skip, c_out, c_in = scales[:3, :, None, None, None]
        with torch.cuda.device_of(x):  # where Triton launches its kernels
            f = self.network(c_in * x, scales[3], labels, augment_labels)
        return torch.addcmul(c_skip * x, c_out, f.float())
