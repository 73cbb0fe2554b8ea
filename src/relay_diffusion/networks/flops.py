"""FLOPs of a network and peak FLOP/s of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.networks.unet import UNet
from relay_diffusion.utils.resolution import Size


def forward_flops(network: UNet, size: Size | None = None, tokens: int = 0) -> int:
    """Count floating-point operations of one evaluation of one image.

    size: its (height, width); None: as trained. tokens: of its text, padding included; 0 for a network without text.
    Convolutions and matrix products, from shapes alone (on the meta device). A training step costs 3 times as much.
    """
    states = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    on_meta = {name: torch.empty_like(value, device="meta") for name, value in states.items()}
    channels = network.image_channels + network.condition_channels
    x = torch.empty(1, channels, *(size or network.size), device="meta")
    noise, labels = torch.empty(1, device="meta"), torch.empty(1, device="meta", dtype=torch.long)
    level, text, dim = noise if network.condition_channels else None, None, network.context_dim
    if dim:
        mask = torch.empty(1, tokens, device="meta", dtype=torch.bool)
        text = TextStates(torch.empty(1, tokens, dim, device="meta"), mask, torch.empty(1, dim, device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(network, on_meta, (x, noise, labels, None, level, text))
    return int(counter.get_total_flops())


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 10) -> float:
    """Measure FLOP/s of a large matrix product on this GPU.

    The reference for reported utilisation.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with _products_as_convolutions():
        for _ in range(3):
            a @ b
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            a @ b
        end.record()
        end.synchronize()
    seconds: float = start.elapsed_time(end) / 1e3
    return 2 * size**3 * repeats / seconds


@contextmanager
def _products_as_convolutions() -> Iterator[None]:
    """Use TF32 for matrix products in the block if convolutions do."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        matmul.fp32_precision = before
