"""The parts of the UNet: normalisation, resampling, attention, the residual block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MAX_GROUPS = 32
MIN_GROUP_CHANNELS = 4


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least 4 channels: the largest number of groups that divides."""
    most = max(1, min(MAX_GROUPS, channels // MIN_GROUP_CHANNELS))
    groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Start a layer at zero, so that its residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def downsample(x: Tensor) -> Tensor:
    """Halve the resolution by the mean of 2x2 pixels: [B,C,H,W] -> [B,C,H/2,W/2]."""
    return F.avg_pool2d(x, 2)


def upsample(x: Tensor) -> Tensor:
    """Double the resolution by repeating pixels: [B,C,H,W] -> [B,C,2H,2W]."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class SelfAttention(nn.Module):
    """Multi-head self-attention over pixels, added to its input: [B,C,H,W] -> [B,C,H,W].

    Heads of `head_channels` channels (one head of all channels, if they are fewer or do not divide).
    """

    def __init__(self, channels: int, head_channels: int = 64) -> None:
        super().__init__()
        self.heads = channels // head_channels if channels % head_channels == 0 else 1
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,H,W]."""
        height = x.shape[-2]
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b (n heads c) h w -> n b heads (h w) c", n=3, heads=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(rearrange(attended, "b heads (h w) c -> b (heads c) h w", h=height))


class ResidualBlock(nn.Module):
    """norm, SiLU, conv; norm, scale and shift by the embedding, SiLU, dropout, conv; plus the input (ADM's block).

    `up` or `down` resamples by two before the first convolution and on the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        dropout: float = 0.0,
        attention: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.up, self.down, self.dropout = up, down, dropout
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(embedding_channels, 2 * out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attention = SelfAttention(out_channels) if attention else None

    def _resample(self, x: Tensor) -> Tensor:
        if self.up:
            return upsample(x)
        return downsample(x) if self.down else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B,C,H,W], embedding [B,E] -> [B,C',H',W']."""
        hidden = self.conv0(self._resample(F.silu(self.norm0(x))))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = F.silu(torch.addcmul(shift, self.norm1(hidden), scale + 1))
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        shortcut = self._resample(x)
        if self.skip is not None:
            shortcut = self.skip(shortcut)
        out = shortcut + hidden
        return out if self.attention is None else self.attention(out)
