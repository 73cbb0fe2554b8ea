"""Log the loss, gradients, throughput and memory of training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.networks.flops import forward_flops, matrix_peak
from relay_diffusion.training.callbacks.periodic import PeriodicCallback, exclude_from_throughput, log_row
from relay_diffusion.training.loggers import last_step


class TrainingLog(PeriodicCallback):
    """Log means over every `every_n_images` images.

    The x-axis is the number of images seen. loss: mean weighted squared error per element. loss_noise_K: the same for
    the K-th quarter of noise levels, 1 the smallest noise. gradient_norm: L2 norm of all gradients after replacement of
    non-finite ones and before clipping; mean over optimizer steps. replaced_gradients: number since the start of the
    run. lr: learning rate. ema_half_life: present half-life in images. images_per_second: without the time in
    `exclude_from_throughput`. tflops: 10^12 operations of convolutions and matrix products per second and device. On a
    GPU also utilisation, the ratio of tflops to that of a large matrix product, and memory_gib, the peak memory.
    After a resume, rows that metrics.csv already has are not sent to loggers again.
    """

    def __init__(self, every_n_images: int, bins: int = 4) -> None:
        super().__init__(every_n_images)
        if not 1 <= bins <= 1000:
            raise ValueError(f"bins={bins}: must lie between 1 and 1000")
        self.bins = bins
        self._sums: Tensor | None = None
        self._counted_from, self._clock, self._logged = 0, 0.0, -1
        self._flops, self._peak = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Measure the device."""
        super().on_train_start(trainer, pl_module)
        self._logged = last_step(trainer.loggers, "train")
        self._flops = 0
        if pl_module.device.type == "cuda":
            half = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float16
            self._peak = matrix_peak(pl_module.device, half if "16" in str(trainer.precision) else torch.float32)
        self._restart(pl_module)

    def _restart(self, stage: DiffusionStage) -> None:
        self._sums = torch.zeros(2, self.bins, device=stage.device, dtype=torch.float32)
        self._counted_from, self._clock = stage.images_seen, _training_seconds(stage)

    @property
    def logged(self) -> list[str]:
        """The metrics that callbacks can monitor."""
        if self.every_n_images <= 0:
            return []
        bins = [f"loss_noise_{i + 1}" for i in range(self.bins)]
        others = ["loss", "gradient_norm", "replaced_gradients", "lr", "ema_half_life", "images_per_second", "tflops"]
        return [f"train/{name}" for name in (*others, *bins, "utilisation", "memory_gib")]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: DiffusionStage, batch: Any, batch_idx: int) -> None:
        """Count the operations of a step at the first batch.

        It shows the number of tokens.
        """
        if self._flops:
            return
        tokens = batch[2].tokens.shape[1] if pl_module.text_dim and len(batch) > 2 else 0
        with exclude_from_throughput(pl_module):
            forward = forward_flops(pl_module.denoiser.network, tokens=tokens)
        self._flops = 3 * forward  # a backward pass costs two forward passes

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: DiffusionStage,
        outputs: Mapping[str, Any],
        *args: Any,
    ) -> None:
        """Add the batch to the sums on the device; log when due."""
        assert self._sums is not None
        level = pl_module.corruption.schedule.level(outputs["sigma"].float())
        bins = (level * self.bins).long().clamp(0, self.bins - 1).to(self._sums.device, non_blocking=True)
        self._sums[0].index_add_(0, bins, outputs["per_image"].float())
        self._sums[1].index_add_(0, bins, torch.ones_like(bins, dtype=torch.float32))
        if self.due(pl_module.images_seen):
            self.act(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Log the images since the last row."""
        if self.every_n_images > 0 and pl_module.images_seen > self._counted_from:
            self.act(trainer, pl_module)

    def act(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        """Log a row, and start the next one."""
        total, count = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        seconds = _training_seconds(stage) - self._clock
        values = {f"loss_noise_{i + 1}": s / n for i, (s, n) in enumerate(zip(total, count, strict=True)) if n}
        speed = (stage.images_seen - self._counted_from) / seconds
        values |= {
            "loss": sum(total) / sum(count),
            "images_per_second": speed,
            "tflops": speed * self._flops / trainer.world_size / 1e12,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "replaced_gradients": float(stage.replaced_gradients),
        }
        if stage.ema is not None:
            values["ema_half_life"] = stage.ema.half_life(stage.images_seen)
        norm = stage.gradient_norm.take()
        if norm is not None:
            values["gradient_norm"] = norm
        if stage.device.type == "cuda":
            values["utilisation"] = values["tflops"] * 1e12 / self._peak
            values["memory_gib"] = torch.cuda.max_memory_allocated(stage.device) / 2**30
        stage.fit_state.metrics = values
        log_row(trainer, stage, "train", values, again=stage.images_seen <= self._logged)
        self._restart(stage)


def _training_seconds(stage: DiffusionStage) -> float:
    """Return the training time in seconds, without `exclude_from_throughput`."""
    return time.perf_counter() - stage.fit_state.excluded_seconds
