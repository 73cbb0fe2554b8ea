"""Non-finite gradients, the gradient norm, and consecutive non-finite steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from relay_diffusion.kernels import HAVE_TRITON

GRADIENT_LIMIT = 1e5  # replaces an infinite gradient, as published


def replace_nonfinite(gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Replace NaN gradients by 0 and infinite ones by +-1e5, in place.

    As published. Returns the number of replaced elements and the L2 norm of all elements afterwards, on the device. On
    a GPU one kernel reads all gradients once, and writes only what it replaces.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.int64), torch.zeros(())
    if HAVE_TRITON and all(gradient.is_cuda and _is_dense(gradient) for gradient in gradients):
        from relay_diffusion.kernels.nonfinite import replace_all

        return replace_all(gradients, GRADIENT_LIMIT)
    counts = [gradient.isfinite().logical_not_().sum() for gradient in gradients]
    for gradient in gradients:
        torch.nan_to_num_(gradient, nan=0.0, posinf=GRADIENT_LIMIT, neginf=-GRADIENT_LIMIT)
    return torch.stack(counts).sum(), torch.nn.utils.get_total_norm(gradients).float()


class GradientNorm:
    """Mean norm of the gradients over optimizer steps.

    Summed on the device without synchronization.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [2]: sum of the norms, number of steps

    def add(self, norm: Tensor, taken: Tensor | None = None) -> None:
        """Add the norm of a step.

        `taken`: bool on the device, whether the step will take place; None counts it.
        """
        step = torch.stack([norm, torch.ones_like(norm)])
        step = step if taken is None else torch.where(taken.to(step.device), step, 0.0)
        self._sums = step if self._sums is None else self._sums + step

    def take(self) -> float | None:
        """Return the mean since the last call; None without a step."""
        total, steps = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        self._sums = None
        return total / steps if steps else None


class NonfiniteSteps:
    """Number of consecutive optimizer steps without finite loss or gradient.

    Counted on the device. A step counts if the loss of every image (of all micro-batches and ranks), or every gradient
    element, is not finite; a step with a finite loss and a finite gradient resets the count to 0. Steps that the fp16
    loss scaler skips because of their gradients change nothing; losses are not scaled, so a non-finite one always
    counts.
    """

    def __init__(self) -> None:
        self.count: Tensor | None = None  # int32 scalar; None before the first step
        self._finite_loss: Tensor | None = None

    def add_losses(self, per_image: Tensor) -> None:
        """Record the losses [B] of a micro-batch."""
        finite = per_image.isfinite().any()
        self._finite_loss = finite if self._finite_loss is None else self._finite_loss | finite

    def end_step(self, finite_gradient: Tensor, taken: Tensor | None = None, world_size: int = 1) -> None:
        """Count an optimizer step (collective).

        finite_gradient: bool on the device, whether any gradient element was finite; equal on all ranks.
        taken: bool on the device, whether the loss scaler lets the step take place; None without one.
        """
        assert self._finite_loss is not None, "no losses were added"
        finite_loss = self._finite_loss.to(torch.int32)
        if world_size > 1:
            dist.all_reduce(finite_loss, dist.ReduceOp.MAX)
        good_loss, good_gradient = finite_loss.bool(), finite_gradient.to(finite_loss.device)
        if self.count is None:
            self.count = torch.zeros((), dtype=torch.int32, device=finite_loss.device)
        after = torch.where(good_loss & good_gradient, 0, self.count + 1)
        if taken is not None:  # a skipped step with a finite loss means that the loss scale was too large
            after = torch.where(good_loss & ~taken.to(after.device), self.count, after)
        self.count, self._finite_loss = after, None

    def now(self) -> int:
        """Return the present count (synchronizes with the device)."""
        return 0 if self.count is None else int(self.count)


def _is_dense(gradient: Tensor) -> bool:
    """Return whether a gradient is float32 and dense in memory.

    The kernel needs both.
    """
    last = gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
    return gradient.dtype == torch.float32 and (last or gradient.is_contiguous())
