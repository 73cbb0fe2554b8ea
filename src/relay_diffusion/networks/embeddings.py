"""Embeddings of the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """cos and sin of the input at `features`/2 frequencies from 1 down towards 1/max_period: [B] -> [B,features]."""

    def __init__(self, features: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        half = features // 2
        frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.frequencies: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [B] -> [B,features], float32."""
        angles = x[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)
