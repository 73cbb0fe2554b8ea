"""FID variant of Inception-v3 for inference.

Rebuilds the TensorFlow graph of 2015-12-05. Source: Szegedy et al., "Rethinking the Inception Architecture for Computer
Vision", arXiv 1512.00567. The graph differs from later Inception-v3 networks: BatchNorm has no scale, average pools
exclude the padding, the pool of the last block takes the maximum. BatchNorm is folded into the convolutions, so a unit
is a convolution with a bias, then ReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7  # the sFID layer is the first 7 channels of Mixed_6d
SPATIAL_SIZE = 17
SPATIAL_FEATURES = SPATIAL_CHANNELS * SPATIAL_SIZE**2
CLASSES = 1008

GRID35 = "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool"
REDUCE35 = "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3"
GRID17 = "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool"
REDUCE17 = "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"
GRID8 = "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool"
BRANCHES = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), GRID35),
    "Mixed_6a": REDUCE35,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), GRID17),
    "Mixed_7a": REDUCE17,
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), GRID8),
}
UNIT_NAMES = (  # in a pt_inception-2015-12-05-*.pth state dict, in the order of the modules
    *(f"Conv2d_{name}" for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")),
    *(f"{block}.branch{branch}" for block, branches in BRANCHES.items() for branch in branches.split()),
)


class ConvUnit(nn.Conv2d):
    """Convolution with the folded BatchNorm as its bias, then ReLU: [B,C,H,W] -> [B,C',H',W'].

    The output has the input's size, or with `valid` only the positions where the kernel fits (TensorFlow's SAME and
    VALID padding).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, valid: bool = False
    ) -> None:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid else (height // 2, width // 2)
        super().__init__(inputs, outputs, (height, width), stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class Branches(nn.ModuleList):
    """Apply every branch to the same input and concatenate the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


def _chain(inputs: int, *units: tuple[int, int | tuple[int, int]]) -> nn.Sequential:
    """Return consecutive units, each given as (output channels, kernel)."""
    widths = [inputs, *(outputs for outputs, _ in units)]
    return nn.Sequential(*(ConvUnit(width, *unit) for width, unit in zip(widths, units, strict=False)))


def _average_pool() -> nn.AvgPool2d:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _grid35(inputs: int, pool: int) -> Branches:
    return Branches(
        [
            ConvUnit(inputs, 64, 1),
            _chain(inputs, (48, 1), (64, 5)),
            _chain(inputs, (64, 1), (96, 3), (96, 3)),
            nn.Sequential(_average_pool(), ConvUnit(inputs, pool, 1)),
        ]
    )


def _reduce35(inputs: int) -> Branches:
    return Branches(
        [
            ConvUnit(inputs, 384, 3, stride=2, valid=True),
            nn.Sequential(_chain(inputs, (64, 1), (96, 3)), ConvUnit(96, 96, 3, stride=2, valid=True)),
            nn.MaxPool2d(3, stride=2),
        ]
    )


def _grid17(width: int) -> Branches:
    """Factorize 7x7 convolutions into pairs of 1x7 and 7x1."""
    row, column = (1, 7), (7, 1)
    return Branches(
        [
            ConvUnit(768, 192, 1),
            _chain(768, (width, 1), (width, row), (192, column)),
            _chain(768, (width, 1), (width, column), (width, row), (width, column), (192, row)),
            nn.Sequential(_average_pool(), ConvUnit(768, 192, 1)),
        ]
    )


def _reduce17() -> Branches:
    seven = _chain(768, (192, 1), (192, (1, 7)), (192, (7, 1)))
    return Branches(
        [
            nn.Sequential(ConvUnit(768, 192, 1), ConvUnit(192, 320, 3, stride=2, valid=True)),
            nn.Sequential(seven, ConvUnit(192, 192, 3, stride=2, valid=True)),
            nn.MaxPool2d(3, stride=2),
        ]
    )


def _grid8(inputs: int, pool: nn.Module) -> Branches:
    """Build a block of an 8x8 level, with 1x3 and 3x1 convolutions."""
    halves = [Branches([ConvUnit(384, 384, (1, 3)), ConvUnit(384, 384, (3, 1))]) for _ in range(2)]
    return Branches(
        [
            ConvUnit(inputs, 320, 1),
            nn.Sequential(ConvUnit(inputs, 384, 1), halves[0]),
            nn.Sequential(_chain(inputs, (448, 1), (384, 3)), halves[1]),
            nn.Sequential(pool, ConvUnit(inputs, 192, 1)),
        ]
    )


class InceptionNetwork(nn.Module):
    """Inception-v3 network of the FID literature.

    Normalized images [B,3,299,299] -> (pool [B,2048], spatial [B,7,17,17], logits [B,1008] or None). `fc` has no bias:
    the published Inception Score is taken from softmax(W pool) without it. It is a convolution like the rest, so that
    one precision setting covers the whole network.
    """

    def __init__(self, classes: bool) -> None:
        super().__init__()
        self.until_spatial = nn.Sequential(
            ConvUnit(3, 32, 3, stride=2, valid=True),
            ConvUnit(32, 32, 3, valid=True),
            ConvUnit(32, 64, 3),
            nn.MaxPool2d(3, stride=2),
            ConvUnit(64, 80, 1),
            ConvUnit(80, 192, 3, valid=True),
            nn.MaxPool2d(3, stride=2),
            _grid35(192, pool=32),
            _grid35(256, pool=64),
            _grid35(288, pool=64),
            _reduce35(288),
            *(_grid17(width) for width in (128, 160, 160)),
        )
        self.until_pool = nn.Sequential(
            _grid17(192),
            _reduce17(),
            _grid8(1280, _average_pool()),
            _grid8(2048, nn.MaxPool2d(3, stride=1, padding=1)),
        )
        self.fc = nn.Conv2d(POOL_FEATURES, CLASSES, 1, bias=False) if classes else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x = self.until_spatial(x)
        spatial = x[:, :SPATIAL_CHANNELS].contiguous()
        pool = self.until_pool(x).mean(dim=(2, 3), keepdim=True)
        logits = None if self.fc is None else self.fc(pool).flatten(1)
        return pool.flatten(1), spatial, logits
