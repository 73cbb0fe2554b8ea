"""What tests import: paths, the toy denoiser of the reference vectors, replayed noise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from forked import can_fork, run_forked
from relay_diffusion.diffusion import (
    BlurringCorruption,
    DenoisingLoss,
    GaussianCorruption,
    LogNormal,
    TruncatedLogNormal,
)
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.networks import EDMPreconditioner, UNet
from relay_diffusion.samplers import BlurringSampler, EDMSampler
from relay_diffusion.utils.resolution import Resolution

PROJECT = Path(__file__).parent.parent
REFERENCE = PROJECT / "tests" / "reference"
TRITON = "3.6" if torch.cuda.is_available() else "3.9"  # the interpreter of older ones fails with new NumPy


def class_indices(one_hot: Tensor) -> Tensor:
    """One-hot labels [B,K] of the reference -> class indices [B]."""
    assert bool((one_hot.sum(1) == 1).all())
    return one_hot.argmax(1)


def toy_denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """The denoiser of the reference vectors; labels are class indices of 10 classes, -1 for none."""
    one_hot_mean = 0.0 if labels is None else (labels.clamp(min=0) / 10)[:, None, None, None]
    return x / (1 + sigma[:, None, None, None] ** 2) + 0.1 * torch.sin(3 * x.roll(1, -1)) + 0.05 * one_hot_mean


class Replay:
    """A noise source that hands out recorded draws in order."""

    def __init__(self, draws: Tensor | list[Tensor]) -> None:
        self.draws: Iterator[Tensor] = iter(draws)

    def randn_like(self, x: Tensor) -> Tensor:
        draw = next(self.draws)
        assert draw.shape == x.shape
        return draw.to(x.dtype)

    def skip(self) -> None:
        next(self.draws)

    @property
    def left(self) -> int:
        return len(list(self.draws))


def tiny_stage(
    resolution: Resolution,
    block: int = 1,
    num_classes: int = 2,
    image_channels: int = 3,
    context_dim: int = 0,
    **settings: object,
) -> DiffusionStage:
    """A stage of a few thousand parameters that draws something: its zero layers are filled."""
    network = UNet(
        resolution,
        image_channels,
        channels=8,
        channel_mult=[1, 2],
        blocks=1,
        attention_resolutions=[],
        num_classes=num_classes,
        context_dim=context_dim,
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    if block == 1:
        corruption, sampler = GaussianCorruption(LogNormal()), EDMSampler(steps=3)
    else:
        corruption = BlurringCorruption(TruncatedLogNormal(), block)
        sampler = BlurringSampler(corruption, steps=8)
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    return DiffusionStage(EDMPreconditioner(network), corruption, DenoisingLoss(), sampler, optimizer, **settings)


TINY = (
    "network.channels=8",
    "network.channel_mult=[1]",
    "network.blocks=1",
    "network.num_classes=2",
    "stage.sampler.steps=4",
    "stage.optimizer.lr=1e-3",
    "stage.warmup_images=16",
    "trainer.accelerator=cpu",
    "data.num_workers=0",
    "data.batch_size=4",
    "callbacks.log.every_n_images=8",
    "callbacks.grid.every_n_images=0",
)
"""Overrides that make any training run a matter of seconds."""


def run(
    script: str, *arguments: str, timeout: int = 240, cwd: Path = PROJECT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project as a user would, in a fork of a process that has the package."""
    if not can_fork() or "PYTHONPROFILEIMPORTTIME" in environment:  # which the interpreter reads when it starts
        return start(script, *arguments, timeout=timeout, cwd=cwd, **environment)
    return run_forked([*script.split(), *arguments], cwd, timeout, **environment)


def start(
    script: str, *arguments: str, timeout: int = 240, cwd: Path = PROJECT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project in a new interpreter: for tests of what it imports."""
    return subprocess.run(
        [sys.executable, *script.split(), *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def pythonpath(folder: Path) -> str:
    """PYTHONPATH with the modules of `folder` too."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def weights_of(path: Path) -> dict[str, Tensor]:
    """Raw and EMA weights of a checkpoint."""
    content = torch.load(path, weights_only=True)
    return content["state_dict"] | {f"ema.{k}": v for k, v in content["ema"]["weights"].items()}


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """To the last bit."""
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)
