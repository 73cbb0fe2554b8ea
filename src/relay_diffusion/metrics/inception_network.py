"""The FID variant of Inception-v3 (the TensorFlow graph of 2015-12-05), rebuilt for inference.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567. The graph
differs from later Inception-v3 networks: BatchNorm has no scale, average pools leave the padding out, the pool of the
last block takes the maximum. BatchNorm is folded into the convolutions, so a unit is a convolution with a bias, then
ReLU.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7  # the sFID layer is the first 7 channels of Mixed_6d
SPATIAL_SIZE = 17
SPATIAL_FEATURES = SPATIAL_CHANNELS * SPATIAL_SIZE**2
CLASSES = 1008

ROW, COLUMN = (1, 7), (7, 1)


class ConvUnit(nn.Conv2d):
    """Convolution with the folded BatchNorm as its bias, then ReLU: [B,C,H,W] -> [B,C',H',W'].

    The output has the input's size, or with `valid` only the places where the kernel fits (TensorFlow's SAME, VALID).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, valid: bool = False
    ) -> None:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid else (height // 2, width // 2)
        super().__init__(inputs, outputs, (height, width), stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Grid35(nn.Module):
    """A block on the 35 x 35 grid: 1x1, 5x5, double 3x3 and pool branches."""

    tensorflow_names: ClassVar[dict[str, str]] = {
        "branch1x1": "conv",
        "branch5x5_1": "tower.conv",
        "branch5x5_2": "tower.conv_1",
        "branch3x3dbl_1": "tower_1.conv",
        "branch3x3dbl_2": "tower_1.conv_1",
        "branch3x3dbl_3": "tower_1.conv_2",
        "branch_pool": "tower_2.conv",
    }

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = ConvUnit(inputs, 64, 1)
        self.branch5x5_1 = ConvUnit(inputs, 48, 1)
        self.branch5x5_2 = ConvUnit(48, 64, 5)
        self.branch3x3dbl_1 = ConvUnit(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3)
        self.branch_pool = ConvUnit(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average_pool(x))], dim=1)


class Reduce35(nn.Module):
    """From the 35 x 35 grid to 17 x 17."""

    tensorflow_names: ClassVar[dict[str, str]] = {
        "branch3x3": "conv",
        "branch3x3dbl_1": "tower.conv",
        "branch3x3dbl_2": "tower.conv_1",
        "branch3x3dbl_3": "tower.conv_2",
    }

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvUnit(inputs, 384, 3, stride=2, valid=True)
        self.branch3x3dbl_1 = ConvUnit(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, stride=2, valid=True)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class Grid17(nn.Module):
    """A block on the 17 x 17 grid: 7x7 convolutions as pairs of 1x7 and 7x1. Its output begins with the 1x1 branch."""

    tensorflow_names: ClassVar[dict[str, str]] = {
        "branch1x1": "conv",
        "branch7x7_1": "tower.conv",
        "branch7x7_2": "tower.conv_1",
        "branch7x7_3": "tower.conv_2",
        "branch7x7dbl_1": "tower_1.conv",
        "branch7x7dbl_2": "tower_1.conv_1",
        "branch7x7dbl_3": "tower_1.conv_2",
        "branch7x7dbl_4": "tower_1.conv_3",
        "branch7x7dbl_5": "tower_1.conv_4",
        "branch_pool": "tower_2.conv",
    }

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvUnit(768, 192, 1)
        self.branch7x7_1 = ConvUnit(768, width, 1)
        self.branch7x7_2 = ConvUnit(width, width, ROW)
        self.branch7x7_3 = ConvUnit(width, 192, COLUMN)
        self.branch7x7dbl_1 = ConvUnit(768, width, 1)
        self.branch7x7dbl_2 = ConvUnit(width, width, COLUMN)
        self.branch7x7dbl_3 = ConvUnit(width, width, ROW)
        self.branch7x7dbl_4 = ConvUnit(width, width, COLUMN)
        self.branch7x7dbl_5 = ConvUnit(width, 192, ROW)
        self.branch_pool = ConvUnit(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average_pool(x))], dim=1)


class Reduce17(nn.Module):
    """From the 17 x 17 grid to 8 x 8."""

    tensorflow_names: ClassVar[dict[str, str]] = {
        "branch3x3_1": "tower.conv",
        "branch3x3_2": "tower.conv_1",
        "branch7x7x3_1": "tower_1.conv",
        "branch7x7x3_2": "tower_1.conv_1",
        "branch7x7x3_3": "tower_1.conv_2",
        "branch7x7x3_4": "tower_1.conv_3",
    }

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvUnit(768, 192, 1)
        self.branch3x3_2 = ConvUnit(192, 320, 3, stride=2, valid=True)
        self.branch7x7x3_1 = ConvUnit(768, 192, 1)
        self.branch7x7x3_2 = ConvUnit(192, 192, ROW)
        self.branch7x7x3_3 = ConvUnit(192, 192, COLUMN)
        self.branch7x7x3_4 = ConvUnit(192, 192, 3, stride=2, valid=True)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class Grid8(nn.Module):
    """A block on the 8 x 8 grid: its 3x3 branches end in a 1x3 and a 3x1 side by side."""

    tensorflow_names: ClassVar[dict[str, str]] = {
        "branch1x1": "conv",
        "branch3x3_1": "tower_conv",
        "branch3x3_2a": "tower_mixed_conv",
        "branch3x3_2b": "tower_mixed_conv_1",
        "branch3x3dbl_1": "tower_1_conv",
        "branch3x3dbl_2": "tower_1_conv_1",
        "branch3x3dbl_3a": "tower_1_mixed_conv",
        "branch3x3dbl_3b": "tower_1_mixed_conv_1",
        "branch_pool": "tower_2_conv",
    }

    def __init__(self, inputs: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvUnit(inputs, 320, 1)
        self.branch3x3_1 = ConvUnit(inputs, 384, 1)
        self.branch3x3_2a = ConvUnit(384, 384, (1, 3))
        self.branch3x3_2b = ConvUnit(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvUnit(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvUnit(448, 384, 3)
        self.branch3x3dbl_3a = ConvUnit(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvUnit(384, 384, (3, 1))
        self.branch_pool = ConvUnit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average_pool(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, dim=1)


class InceptionNetwork(nn.Module):
    """Normalised images [B,3,299,299] -> (pool [B,2048], spatial [B,7,17,17], logits [B,1008] or None).

    `fc` has no bias: the published Inception Score is taken from softmax(W pool), the bias left out. It is a
    convolution like the rest, so that one precision setting covers the whole network.
    """

    tensorflow_names: ClassVar[dict[str, str]] = {
        "Conv2d_1a_3x3": "conv",
        "Conv2d_2a_3x3": "conv_1",
        "Conv2d_2b_3x3": "conv_2",
        "Conv2d_3b_1x1": "conv_3",
        "Conv2d_4a_3x3": "conv_4",
        "Mixed_5b": "mixed",
        "Mixed_5c": "mixed_1",
        "Mixed_5d": "mixed_2",
        "Mixed_6a": "mixed_3",
        "Mixed_6b": "mixed_4",
        "Mixed_6c": "mixed_5",
        "Mixed_6d": "mixed_6",
        "Mixed_6e": "mixed_7",
        "Mixed_7a": "mixed_8",
        "Mixed_7b": "mixed_9",
        "Mixed_7c": "mixed_10",
    }

    def __init__(self, classes: bool) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2, valid=True)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, valid=True)
        self.Mixed_5b = Grid35(192, pool=32)
        self.Mixed_5c = Grid35(256, pool=64)
        self.Mixed_5d = Grid35(288, pool=64)
        self.Mixed_6a = Reduce35(288)
        self.Mixed_6b = Grid17(128)
        self.Mixed_6c = Grid17(160)
        self.Mixed_6d = Grid17(160)
        self.Mixed_6e = Grid17(192)
        self.Mixed_7a = Reduce17()
        self.Mixed_7b = Grid8(1280, max_pool=False)
        self.Mixed_7c = Grid8(2048, max_pool=True)
        self.fc = nn.Conv2d(POOL_FEATURES, CLASSES, 1, bias=False) if classes else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :SPATIAL_CHANNELS].contiguous()
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean(dim=(2, 3), keepdim=True)
        logits = None if self.fc is None else self.fc(pool).flatten(1)
        return pool.flatten(1), spatial, logits

    def tensorflow_name(self, unit: str) -> str:
        """The TensorFlow name of a unit: "Mixed_5b.branch5x5_2" -> "mixed.tower.conv_1"."""
        block, _, branch = unit.partition(".")
        name = self.tensorflow_names[block]
        return f"{name}.{getattr(self, block).tensorflow_names[branch]}" if branch else name
