"""A later stage of a conditioned cascade: the baseline that a relay stage is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_diffusion.diffusion import ConditionedCorruption, RandnLike
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.networks import Condition


class CascadeStage(DiffusionStage):
    """Diffusion from noise conditioned on the image of the previous stage (Ho et al. 2021; Saharia et al. 2021).

    The small image, in training the block mean of the training image, gets noise from the corruption, is enlarged and
    joins the network's input channels; its noise level is an input of the network. Guidance is away from the estimate
    without class, or that of a guide: both see the same small image. Evaluations are not replayed from CUDA graphs.
    """

    conditioned = True
    corruption: ConditionedCorruption

    def training_condition(self, x0: Tensor) -> Condition:
        """Return block means of x0 [B,C,H,W], with noise of a random level, enlarged."""
        small, level = self.corruption.small(x0), self.corruption.draw_condition_levels(len(x0))
        return Condition(self.corruption.condition(small, level, torch.randn_like(small)), level)

    def sampling_condition(self, previous: Tensor | None, randn_like: RandnLike) -> Condition:
        """Return images [B,C,h,w] of the previous stage, with noise of level `condition_noise`, enlarged."""
        assert previous is not None  # or the corruption's `start` would have refused
        small = previous.to(self.device, torch.float32)
        level = torch.full((len(small),), self.corruption.condition_noise, device="cpu")
        return Condition(self.corruption.condition(small, level, randn_like(small)), level)
