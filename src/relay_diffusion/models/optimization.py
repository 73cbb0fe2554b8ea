"""Hooks around the optimizer step; all amounts are in images."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from relay_diffusion.models.ema import WeightAverage
from relay_diffusion.models.gradients import GradientNorm, NonfiniteSteps, replace_nonfinite


@dataclass
class FitState:
    """State that the callbacks of one fit share, as `stage.fit_state`.

    stop_signal: the signal that stops all ranks; 0 without one. stop_reason: the option that ended training early.
    kept_checkpoint: the checkpoint that remains if the present state is not saved. metrics: the latest row of the
    training log. excluded_seconds: time spent outside training.
    """

    stop_signal: int = 0
    stop_reason: str = ""
    kept_checkpoint: str = "this run writes no checkpoints"
    metrics: dict[str, float] = field(default_factory=dict)
    excluded_seconds: float = 0.0


class OptimizationHooks(L.LightningModule):
    """Hooks for warm-up, gradient clipping, weight averaging and counting images.

    Applied to the gradients of `denoiser` and its average `ema`. A subclass calls `add_pending` for each micro-batch
    and `prepare_optimizer` for the optimizer that it configures. Raises ValueError for a negative warmup_images.
    """

    denoiser: torch.nn.Module

    def __init__(self, warmup_images: int = 0, images_seen: int = 0) -> None:
        super().__init__()
        if not warmup_images >= 0:
            raise ValueError(f"warmup_images={warmup_images}: must be at least 0")
        self.warmup_images = warmup_images
        self.images_seen = images_seen  # images whose gradients have updated the weights
        self.ema: WeightAverage | None = None  # average of the denoiser; a callback sets it at the start of a fit
        self.fit_state = FitState()
        self.replaced_gradients: Tensor | int = 0  # non-finite gradient elements replaced so far
        self.gradient_norm = GradientNorm()  # computed after replacing non-finite elements, before clipping
        self.nonfinite_steps = NonfiniteSteps()
        self._pending = 0  # images of the current step
        self._norm: Tensor | None = None  # norm of the current step's gradients
        self._base_lrs: list[float] = []
        self._weights: list[torch.nn.Parameter] = []  # of the denoiser

    @property
    def mid_accumulation(self) -> bool:
        """Return whether accumulated gradients have not updated the weights yet."""
        return self._pending > 0

    def add_pending(self, images: int, per_image: Tensor) -> None:
        """Count a micro-batch and its losses.

        images: number over all ranks. per_image: losses [B] of this rank.
        """
        self._pending += images
        self.nonfinite_steps.add_losses(per_image)

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Store the weights and the learning rates.

        A loaded optimizer state keeps this run's `fused` setting.
        """
        optimizer.register_load_state_dict_pre_hook(_keep_fused)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._weights = list(self.denoiser.parameters())  # collecting them takes longer than a small kernel

    def averaged(self) -> AbstractContextManager[None]:
        """Use the EMA weights in the block, if training keeps an average."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set the learning rate, replace non-finite gradients, and compute their norm.

        Replaced gradient elements are counted.
        """
        warmth = min(self.images_seen / self.warmup_images, 1.0) if self.warmup_images else 1.0
        for group, lr in zip(optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * warmth
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        replaced, self._norm = replace_nonfinite(gradients)
        elements = sum(gradient.numel() for gradient in gradients)
        self.replaced_gradients = self.replaced_gradients + replaced
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # gradients are unscaled already
        taken = replaced == 0 if scaled else None  # with fp16, Lightning skips a step with infinite gradients
        self.nonfinite_steps.end_step(replaced < elements, taken, self.trainer.world_size)
        self.gradient_norm.add(self._norm, taken)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,  # noqa: ARG002
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the L2 norm of the gradients, or each element.

        Non-finite gradients were replaced before. Lightning's own clipping rejects a fused optimizer under mixed
        precision, where clipping is valid: the gradients are unscaled already.
        """
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self._weights, gradient_clip_val)
        else:
            assert self._norm is not None  # set in on_before_optimizer_step
            torch.nn.utils.clip_grads_with_norm_(self._weights, gradient_clip_val, self._norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, update the average, and count the images of the step."""
        super().optimizer_step(*args, **kwargs)
        for weight in self._weights:  # before a graph replay, which adds to existing gradients
            weight.grad = None
        batch, self._pending = self._pending, 0
        if self.ema is not None:
            self.ema.update(batch, self.images_seen)
        self.images_seen += batch

    def setup(self, stage: str) -> None:
        """Reset the state of an earlier fit."""
        if stage == "fit":
            self.nonfinite_steps, self.fit_state, self.ema = NonfiniteSteps(), FitState(), None
            self.gradient_norm, self._pending = GradientNorm(), 0  # left by a fit that failed between two steps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counts."""
        checkpoint["images_seen"] = self.images_seen
        checkpoint["replaced_gradients"] = int(self.replaced_gradients)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counts."""
        self.images_seen = checkpoint["images_seen"]
        self.replaced_gradients = checkpoint["replaced_gradients"]


def _keep_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Keep this run's `fused` setting in a loaded optimizer state."""
    if "fused" not in optimizer.defaults:
        return state
    fused = optimizer.defaults["fused"]
    return state | {"param_groups": [group | {"fused": fused} for group in state["param_groups"]]}
