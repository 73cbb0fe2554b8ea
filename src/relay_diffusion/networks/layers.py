"""Layers of the UNet: normalization, resampling, attention, residual block."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.networks.ops import add, convolve, convolve_enlarged, norm_act, project, query_key_value

MAX_GROUPS = 32
MIN_GROUP_CHANNELS = 4
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def group_norm(channels: int) -> nn.GroupNorm:
    """Create a GroupNorm with as many groups as divide `channels`.

    At most 32 groups, of at least 4 channels.
    """
    most = max(1, min(MAX_GROUPS, channels // MIN_GROUP_CHANNELS))
    groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


def head_count(channels: int, head_channels: int) -> int:
    """Count the attention heads of `head_channels` channels.

    One head of all channels, if these are fewer or not divisible.
    """
    return channels // head_channels if channels % head_channels == 0 else 1


def zero(layer: Layer) -> Layer:
    """Initialize a layer to zero.

    A residual block then starts as the identity.
    """
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class SelfAttention(nn.Module):
    """Multi-head self-attention over pixels, with a residual connection.

    [B,C,H,W] -> [B,C,H,W]. Heads as in `head_count`.
    """

    def __init__(self, channels: int, head_channels: int = 64) -> None:
        super().__init__()
        self.heads = head_count(channels, head_channels)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute x + attention(x): [B,C,H,W] -> [B,C,H,W]."""
        h, shortcut, _ = norm_act(x, self.norm, silu=False)
        q, k, v = (rearrange(t, "b l (heads c) -> b heads l c", heads=self.heads) for t in query_key_value(self.qkv, h))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads l c -> b l (heads c)")
        out = F.linear(attended, self.proj.weight.flatten(1), self.proj.bias)
        return add(rearrange(out, "b (h w) c -> b c h w", h=x.shape[-2]), shortcut)


class CrossAttention(nn.Module):
    """Multi-head attention of pixels to token states, with a residual connection.

    [B,C,H,W], tokens [B,T,D] -> [B,C,H,W]. Heads as in `head_count`. At least one token of each row must be unmasked.
    """

    def __init__(self, channels: int, context_dim: int, head_channels: int = 64) -> None:
        super().__init__()
        self.heads = head_count(channels, head_channels)
        self.norm = group_norm(channels)
        self.query = nn.Linear(channels, channels)
        self.norm_tokens = nn.LayerNorm(context_dim)
        self.key_value = nn.Linear(context_dim, 2 * channels)
        self.proj = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, text: TextStates) -> Tensor:
        """Compute x + attention(x, text): [B,C,H,W] -> [B,C,H,W]."""
        h, shortcut, _ = norm_act(x, self.norm, silu=False)
        pixels = rearrange(h, "b c h w -> b (h w) c")  # no copy in channels_last
        parts = self.query(pixels), *self.key_value(self.norm_tokens(text.tokens)).chunk(2, dim=-1)
        q, k, v = (rearrange(part, "b l (heads c) -> b heads l c", heads=self.heads) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=text.mask[:, None, None])
        out = self.proj(rearrange(attended, "b heads l c -> b l (heads c)"))
        return add(rearrange(out, "b (h w) c -> b c h w", h=x.shape[-2]), shortcut)


class ResidualBlock(nn.Module):
    """Residual block of ADM, with scale and shift from the embedding.

    norm, SiLU, conv; norm, scale and shift by the embedding, SiLU, dropout, conv; plus the input. `up` or `down`
    resamples by two before the first convolution and on the shortcut. `checkpointed`: training keeps only the input and
    recomputes the rest in the backward pass. `context_dim`: channels of token states for cross-attention after the
    self-attention; 0: none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        dropout: float = 0.0,
        attention: bool = False,
        checkpointed: bool = False,
        up: bool = False,
        down: bool = False,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.up, self.down, self.dropout, self.checkpointed = up, down, dropout, checkpointed
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(embedding_channels, 2 * out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attention = SelfAttention(out_channels) if attention else None
        self.cross_attention = CrossAttention(out_channels, context_dim) if attention and context_dim else None

    def forward(
        self, x: Tensor, embedding: Tensor, skip: Tensor | None = None, text: TextStates | None = None
    ) -> Tensor:
        """Apply the block: x [B,C,H,W], embedding [B,E] -> [B,C',H',W'].

        skip [B,D,H,W]: concatenated to the input channels. text: for the cross-attention, if there is any.
        """
        if self.checkpointed and self.training:
            result: Tensor = checkpoint(self._forward, x, embedding, skip, text, use_reentrant=False)
            return result
        return self._forward(x, embedding, skip, text)

    def _forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None, text: TextStates | None) -> Tensor:
        h, shortcut, skip = norm_act(x, self.norm0, skip, down=self.down)
        h, bias = (convolve_enlarged if self.up else convolve)(self.conv0, h)
        dropout = self.dropout if self.training else 0.0
        h, _, _ = norm_act(h, self.norm1, bias=bias, modulation=self.affine(embedding), dropout=dropout)
        h, bias = convolve(self.conv1, h)
        if self.skip is not None:
            shortcut, bias = project(self.skip, shortcut, skip, bias), None
        out = add(h, shortcut, bias, self.up)
        if self.attention is not None:
            out = self.attention(out)
        if self.cross_attention is not None:
            assert text is not None
            out = self.cross_attention(out, text)
        return out


class SinusoidalEmbedding(nn.Module):
    """Cosine and sine of the input at geometrically spaced frequencies.

    [B] -> [B,features]; `features`/2 frequencies from 1 down towards 1/max_period.
    """

    def __init__(self, features: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        half = features // 2
        frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.frequencies: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Embed x: [B] -> [B,features], float32."""
        angles = x[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)
