"""Exponential moving average of the weights in training."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from relay_diffusion.models.ema import WeightAverage
from relay_diffusion.models.stage import DiffusionStage


class EMA(Callback):
    """Average the weights as `stage.ema`, and in checkpoints as "ema".

    The stage updates it in its optimizer step, so it is current for every callback, in any order.
    `half_life_images`: images after which the weight of an old state has halved. `ramp_up`: upper limit of the
    half-life, as a share of the images seen (0.05 as published; null: no limit).
    """

    def __init__(self, half_life_images: float = 500_000, ramp_up: float | None = 0.05) -> None:
        if not half_life_images >= 0:
            raise ValueError(f"half_life_images={half_life_images}: must be at least 0")
        if ramp_up is not None and not ramp_up >= 0:
            raise ValueError(f"ramp_up={ramp_up}: must be at least 0, or null")
        self.half_life_images, self.ramp_up = half_life_images, ramp_up
        self._weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the average from the present weights or a loaded average."""
        assert isinstance(pl_module, DiffusionStage)
        pl_module.ema = WeightAverage(pl_module.denoiser, self.half_life_images, self.ramp_up, self._weights)
        self._weights = pl_module.ema.weights

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the average to the checkpoint."""
        checkpoint["ema"] = {"weights": dict(self._weights)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the average of the checkpoint, if it has one."""
        self._weights = dict(checkpoint.get("ema", {}).get("weights", {}))
