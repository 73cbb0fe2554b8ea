"""EDM preconditioning: from a network to a denoiser."""

from __future__ import annotations

from torch import Tensor, nn

from relay_diffusion.diffusion.corruption import expand
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
        x, sigma = x.float(), sigma.float().to(x.device, non_blocking=True)
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        c_in = 1 / total.sqrt()
        c_noise = sigma.log() / 4
        f = self.network(expand(c_in) * x, c_noise, labels, augment_labels)
        return expand(c_skip) * x + expand(c_out) * f.float()
