"""The steps of a block between its convolutions: in plain torch, and where they are fused on a GPU."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from relay_diffusion.kernels import HAVE_TRITON

FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = "_relay_moments"
"""Attribute of an activation: its moments, computed by a fused `add` and used by the next GroupNorm."""


def downsample(x: Tensor) -> Tensor:
    """Halve the resolution by the mean of 2x2 pixels: [B,C,H,W] -> [B,C,H/2,W/2]."""
    return F.avg_pool2d(x, 2)


def upsample(x: Tensor) -> Tensor:
    """Double the resolution by repeating pixels: [B,C,H,W] -> [B,C,2H,2W]."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def fusible(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these activations: on a GPU, channels_last, of one type of at most 32 bits."""
    given = [x for x in tensors if x is not None]
    return (
        on_gpu(given[0])
        and given[0].dtype in FUSED_TYPES
        and all(x.dtype == given[0].dtype for x in given)
        and all(x.is_contiguous(memory_format=torch.channels_last) for x in given)
    )


def on_gpu(x: Tensor) -> bool:
    """Whether kernels can run where this tensor lies."""
    return HAVE_TRITON and x.is_cuda


def norm_act(
    x: Tensor,
    norm: nn.GroupNorm,
    skip: Tensor | None = None,
    bias: Tensor | None = None,
    modulation: Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
    down: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """drop(silu(norm(cat(x, skip) + bias) (1 + scale) + shift)), and x and skip again, for the shortcut.

    x [B,C,H,W], skip [B,D,H,W]; bias [C] of the convolution that made x; modulation [B,2C]: scale and shift.
    `down` halves the result and x, of even height and width; it takes no skip and no dropout.
    """
    assert not down or (skip is None and not dropout and x.shape[2] % 2 == x.shape[3] % 2 == 0)
    if fusible(x, skip):
        from relay_diffusion.kernels.autograd import Norm, NormOptions

        options = NormOptions(norm.num_groups, norm.eps, silu, dropout, down)
        moments = _moments(x), None if skip is None else _moments(skip)
        modulation = None if modulation is None else modulation.expand(len(x), -1)
        result: tuple[Tensor, Tensor, Tensor | None] = Norm.apply(
            x, skip, *moments, norm.weight, norm.bias, bias, modulation, options
        )
        return result
    h = x if skip is None else torch.cat([x, skip], dim=1)
    if bias is not None:
        h = h + bias.to(h.dtype)[:, None, None]
    h = norm(h)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, h, scale + 1)
    if silu:
        h = F.silu(h)
    h = F.dropout(h, dropout)
    return (downsample(h), downsample(x), skip) if down else (h, x, skip)


def _moments(x: Tensor) -> Tensor:
    from relay_diffusion.kernels.autograd import measure

    moments, version = getattr(x, MOMENTS, (None, None))
    if moments is None or version != _version(x):
        moments = measure(x)
        _keep_moments(x, moments)
    return cast(Tensor, moments)


def _keep_moments(x: Tensor, moments: Tensor) -> None:
    setattr(x, MOMENTS, (moments, _version(x)))


def _version(x: Tensor) -> int:
    """Return torch's counter of in-place writes to x; 0 for inference tensors."""
    return 0 if x.is_inference() else x._version


def add(hidden: Tensor, shortcut: Tensor, bias: Tensor | None = None, up: bool = False) -> Tensor:
    """hidden + bias + shortcut: [B,C,H,W], bias [C]; `up`: the shortcut [B,C,H/2,W/2] is enlarged first."""
    if fusible(hidden, shortcut):
        from relay_diffusion.kernels.autograd import Add

        out: Tensor
        out, moments = Add.apply(hidden, shortcut, bias, up)
        _keep_moments(out, moments)
        return out
    if bias is not None:
        hidden = hidden + bias.to(hidden.dtype)[:, None, None]
    return hidden + (upsample(shortcut) if up else shortcut)


def convolve_image(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The first convolution, of an image of few channels [B,C,H,W].

    On a GPU the bias is one more channel, of ones, and eight channels are faster than fewer.
    """
    if not (fusible(x) and x.shape[1] < 8):
        out: Tensor = conv(x)
        return out
    assert conv.bias is not None
    spare = 7 - x.shape[1]
    bias = F.pad(conv.bias[:, None, None, None], (1, 1, 1, 1))
    weight = F.pad(torch.cat([conv.weight, bias], dim=1), (0, 0, 0, 0, 0, spare))
    ones = x.new_ones(1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
    padded = F.pad(torch.cat([x, ones], dim=1), (0, 0, 0, 0, 0, spare))
    return F.conv2d(
        padded.contiguous(memory_format=torch.channels_last),
        weight.contiguous(memory_format=torch.channels_last),
        padding=1,
    )


def convolve_enlarged(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The 3x3 convolution of `upsample(x)`, as `convolve` gives it: [B,C,H,W] -> [B,C',2H,2W].

    Each output pixel depends on 2x2 pixels of x, so it is one 4x4 transposed convolution with summed weights and
    4/9 of the operations.
    """
    weight = conv.weight
    for dim in (2, 3):
        first, second, third = weight.unbind(dim)
        weight = torch.stack([third, second + third, first + second, first], dim)
    weight = weight.transpose(0, 1).to(memory_format=torch.channels_last)
    bias = None if fusible(x) else conv.bias
    out = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    return out, conv.bias if bias is None else None


def query_key_value(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A 1x1 convolution to three times the channels, in three parts and as pixels: [B,C,H,W] -> each [B,H W,C]."""
    tokens = rearrange(x, "b c h w -> b (h w) c")  # in channels_last as it lies
    weight = conv.weight.flatten(1)
    if fusible(x):
        from relay_diffusion.kernels.autograd import QueryKeyValue

        parts: tuple[Tensor, Tensor, Tensor] = QueryKeyValue.apply(tokens, weight, conv.bias)
        return parts
    q, k, v = F.linear(tokens, weight, conv.bias).chunk(3, dim=-1)
    return q, k, v


def convolve(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convolve; return the result and the bias that the next fused step adds (None: added)."""
    if fusible(x):
        return F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias
    return conv(x), None


def project(conv: nn.Conv2d, x: Tensor, skip: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of cat(x, skip), plus one more bias [C']: [B,C,H,W], [B,D,H,W] -> [B,C',H,W].

    On a GPU the concatenation is never built: two matrix products, the second one added to the first.
    """
    assert conv.bias is not None
    if fusible(x, skip):
        weight = conv.weight.flatten(1).to(x.dtype)
        total = conv.bias if bias is None else conv.bias + bias
        out = torch.addmm(total.to(x.dtype), _rows(x), weight[:, : x.shape[1]].T)
        if skip is not None:
            out.addmm_(_rows(skip), weight[:, x.shape[1] :].T)
        return out.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
    weight = conv.weight.flatten(1)[:, :, None, None]  # so that the gradient lies as above
    out = F.conv2d(x if skip is None else torch.cat([x, skip], dim=1), weight, conv.bias)
    return out if bias is None else out + bias.to(out.dtype)[:, None, None]


def _rows(x: Tensor) -> Tensor:
    """Pixels of a channels_last tensor as rows, without a copy: [B,C,H,W] -> [B H W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
