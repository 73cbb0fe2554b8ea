"""Operations between convolutions, in plain torch or fused on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Halve the resolution by averaging 2x2 pixels: [B,C,H,W] -> [B,C,H/2,W/2]."""
    return F.avg_pool2d(x, 2)


def upsample(x: Tensor) -> Tensor:
    """Double the resolution by repeating pixels: [B,C,H,W] -> [B,C,2H,2W]."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def fusible(*tensors: Tensor | None) -> bool:
    """Return whether the Triton kernels support these tensors.

    On a GPU, channels_last, of one dtype of at most 32 bits.
    """
    given = [x for x in tensors if x is not None]
    return (
        on_gpu(given[0])
        and given[0].dtype in FUSED_TYPES
        and all(x.dtype == given[0].dtype for x in given)
        and all(x.is_contiguous(memory_format=torch.channels_last) for x in given)
    )


def on_gpu(x: Tensor) -> bool:
    """Return whether Triton kernels can run on this tensor's device."""
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
    """Group norm, modulation, SiLU and dropout; also returns its inputs.

    drop(silu(norm(cat(x, skip) + bias) (1 + scale) + shift)); x and skip are returned for the shortcut.
    x [B,C,H,W], skip [B,D,H,W]; bias [C] of the convolution that computed x; modulation [B,2C]: scale and shift.
    `down` halves the result and x, of even height and width; it excludes skip and dropout.
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
    """Add hidden, bias and shortcut at the end of a residual block.

    [B,C,H,W], bias [C]. `up`: the shortcut [B,C,H/2,W/2] is upsampled first.
    """
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
    """Convolve an image of few channels [B,C,H,W], the first layer.

    On a GPU the bias is an additional channel of ones, and the channels are padded to eight, which is faster.
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
    """Compute the 3x3 convolution of `upsample(x)`: [B,C,H,W] -> [B,C',2H,2W].

    Returns result and bias as `convolve`. Each output pixel depends on 2x2 pixels of x, so it is one 4x4 transposed
    convolution with summed weights and 4/9 of the operations.
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
    """Project pixels to query, key and value by a 1x1 convolution.

    [B,C,H,W] -> three tensors [B,H W,C].
    """
    tokens = rearrange(x, "b c h w -> b (h w) c")  # no copy in channels_last
    weight = conv.weight.flatten(1)
    if fusible(x):
        from relay_diffusion.kernels.autograd import QueryKeyValue

        parts: tuple[Tensor, Tensor, Tensor] = QueryKeyValue.apply(tokens, weight, conv.bias)
        return parts
    q, k, v = F.linear(tokens, weight, conv.bias).chunk(3, dim=-1)
    return q, k, v


def convolve(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convolve without the bias where a fused step can add it.

    Returns the result and the bias that the next step adds; None if it is added already.
    """
    if fusible(x):
        return F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias
    return conv(x), None


def project(conv: nn.Conv2d, x: Tensor, skip: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Apply a 1x1 convolution to cat(x, skip).

    [B,C,H,W], [B,D,H,W] -> [B,C',H,W]; `bias` [C'] is added to that of the convolution. On a GPU two matrix products
    replace the concatenation; the second accumulates into the first.
    """
    assert conv.bias is not None
    if fusible(x, skip):
        weight = conv.weight.flatten(1).to(x.dtype)
        total = conv.bias if bias is None else conv.bias + bias
        out = torch.addmm(total.to(x.dtype), _rows(x), weight[:, : x.shape[1]].T)
        if skip is not None:
            out.addmm_(_rows(skip), weight[:, x.shape[1] :].T)
        return out.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
    weight = conv.weight.flatten(1)[:, :, None, None]  # so that the gradient has the same memory layout as above
    out = F.conv2d(x if skip is None else torch.cat([x, skip], dim=1), weight, conv.bias)
    return out if bias is None else out + bias.to(out.dtype)[:, None, None]


def _rows(x: Tensor) -> Tensor:
    """View a channels_last tensor as rows of pixels: [B,C,H,W] -> [B H W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def report_slow_settings(device: torch.device, networks: Mapping[str, object]) -> None:
    """Print settings that slow down a run on a GPU; `networks`: by the option that sets channels_last."""
    if device.type != "cuda":
        return
    slow = "and the fused kernels are not used"
    if not HAVE_TRITON:
        print(f"note: Triton is not installed, {slow}: slower, same images; pip install triton", flush=True)
    for option, network in networks.items():
        # networks of other packages have no memory_format
        if getattr(network, "memory_format", torch.channels_last) is not torch.channels_last:
            print(f"note: {option}=false is slow on a GPU, {slow}: same numbers with true", flush=True)
