"""Exponential moving average of the network's weights, with its half-life in images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from relay_diffusion.models.stage import DiffusionStage


def present_half_life(seen: int, half_life: float, ramp_up: float | None) -> float:
    """min(half_life, seen ramp_up), in images: `ramp_up` shortens it early in training; None leaves it."""
    return half_life if ramp_up is None else min(half_life, seen * ramp_up)


def ema_beta(batch: int, seen: int, half_life: float, ramp_up: float | None) -> float:
    """Weight of the old average after `batch` more images: 0.5 ** (batch / max(present half-life, 1e-8)).

    `seen`: images before this batch.
    """
    return 0.5 ** (batch / max(present_half_life(seen, half_life, ramp_up), 1e-8))


class EMA(Callback):
    """Averages the stage's network after every optimizer step, in float32; a checkpoint's key "ema" holds it.

    The stage calls the update in its optimizer step, so every callback sees the present average in any order.
    `half_life_images`: after so many images an old weight counts half. `ramp_up`: share of the images seen
    that the half-life may not exceed (0.05 as published; null: no limit).
    """

    def __init__(self, half_life_images: float = 500_000, ramp_up: float | None = 0.05) -> None:
        self.half_life_images, self.ramp_up = half_life_images, ramp_up
        self.weights: dict[str, Tensor] = {}
        self._seen = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Start from the present weights, or bring loaded ones to the device."""
        assert isinstance(pl_module, DiffusionStage)
        present = dict(pl_module.denoiser.named_parameters())
        source = self.weights or present
        self.weights = {k: source[k].detach().to(p.device, torch.float32, copy=True) for k, p in present.items()}
        self._seen = pl_module.images_seen
        pl_module.after_step.append(partial(self._move, pl_module))

    @torch.no_grad()
    def _move(self, stage: DiffusionStage) -> None:
        """Move the average by the images of the step."""
        beta = ema_beta(stage.images_seen - self._seen, self._seen, self.half_life_images, self.ramp_up)
        present = [p.detach().float() for p in stage.denoiser.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), present, 1 - beta)
        self._seen = stage.images_seen

    def half_life(self, images_seen: int) -> float:
        """After so many images an old weight counts half by now."""
        return present_half_life(images_seen, self.half_life_images, self.ramp_up)

    @contextmanager
    def applied(self, stage: DiffusionStage) -> Iterator[None]:
        """Within it, the stage carries the averaged weights; afterwards its own again, whatever happens."""
        parameters = dict(stage.denoiser.named_parameters())
        raw = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            self._copy(self.weights, parameters)
            yield
        finally:
            self._copy(raw, parameters)

    @staticmethod
    @torch.no_grad()
    def _copy(source: dict[str, Tensor], target: dict[str, torch.nn.Parameter]) -> None:
        for name, parameter in target.items():
            parameter.copy_(source[name])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Add the average to the checkpoint."""
        checkpoint["ema"] = {"weights": dict(self.weights)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Continue from the checkpoint's average; one trained without starts from its weights."""
        self.weights = dict(checkpoint.get("ema", {}).get("weights", {}))


def find_ema(trainer: L.Trainer) -> EMA | None:
    """The trainer's average, if it keeps one."""
    return next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]


def averaged(trainer: L.Trainer, stage: DiffusionStage) -> AbstractContextManager[None]:
    """Within it, the stage carries the averaged weights, if the trainer keeps an average."""
    ema = find_ema(trainer)
    return nullcontext() if ema is None else ema.applied(stage)
