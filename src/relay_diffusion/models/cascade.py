"""Later stage of a conditioned cascade, the baseline for a relay stage."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_diffusion.diffusion.corruption import ConditionedCorruption
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.networks import Condition


class CascadeStage(DiffusionStage):
    """Diffusion from noise conditioned on the previous stage's image.

    Ho et al. 2021; Saharia et al. 2021. The small image (in training the block mean of the training image) gets noise,
    is upsampled and concatenated to the network's input; its noise level is an input of the network. In guidance both
    estimates have the same small image. Evaluations are not replayed from CUDA graphs.
    """

    conditioned = True
    corruption: ConditionedCorruption

    def training_condition(self, x0: Tensor) -> Condition:
        """Return noisy, upsampled block means of x0 [B,C,H,W].

        The noise level of each image is random.
        """
        small, level = self.corruption.small(x0), self.corruption.draw_condition_levels(len(x0))
        return Condition(self.corruption.condition(small, level, torch.randn_like(small)), level)

    def sampling_condition(self, previous: Tensor | None, randn_like: RandnLike) -> Condition:
        """Return the previous stage's noisy, upsampled images.

        previous [B,C,h,w]; their noise has level `condition_noise`.
        """
        assert previous is not None  # checked by the corruption's `start`
        small = previous.to(self.device, torch.float32)
        level = torch.full((len(small),), self.corruption.condition_noise, device="cpu")
        return Condition(self.corruption.condition(small, level, randn_like(small)), level)
