"""Training steps of a denoiser replayed from CUDA graphs: launching kernels can take longer than running them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from relay_diffusion.networks.blocks import ResidualBlock
from relay_diffusion.networks.preconditioning import Condition, EDMPreconditioner

WARM_UP = 3  # evaluations before the capture: libraries choose their kernels


@dataclass
class _Captured:
    """One graph forward, one backward, and the memory that they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor
    output_gradient: Tensor
    gradients: list[Tensor | None]
    replays: int = 0


class GraphedTraining:
    """The denoiser with gradients for its weights, forward and backward replayed: the same numbers and random numbers.

    Captured at the first evaluation of a shape, which leaves no trace: neither in gradients nor in the state of the
    generator. One shape is kept. Without a GPU, without gradients, or where blocks are computed again in the backward
    pass, it is the denoiser itself. Raises RuntimeError for a network that a graph cannot hold, for a gradient of any
    evaluation but the last, and for a second one.
    """

    def __init__(self, denoiser: EDMPreconditioner) -> None:
        self.denoiser = denoiser
        self._again = any(isinstance(m, ResidualBlock) and m.checkpointed for m in denoiser.modules())
        self._captured: tuple[Any, _Captured] | None = None

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        condition: Condition | None = None,
    ) -> Tensor:
        """As EDMPreconditioner: x [B,C,H,W], sigma [B], labels [B], ... -> estimate of x0, float32."""
        if not x.is_cuda or self._again or not torch.is_grad_enabled():
            return self.denoiser(x, sigma, labels, augment_labels, condition)
        given = [x, sigma, labels, augment_labels, *(condition or (None, None))]
        there = [value for value in given if value is not None]
        with torch.cuda.device_of(x):
            weights = {name: weight for name, weight in self.denoiser.named_parameters() if weight.requires_grad}
            precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
            where = hash(tuple(weight.data_ptr() for weight in weights.values()))
            shapes = [None if value is None else value.shape for value in given]
            key = (shapes, self.denoiser.training, precision, where)
            if self._captured is None or self._captured[0] != key:
                self._captured = None  # its memory first
                self._captured = key, _capture(self.denoiser, given, weights, precision)
            captured = self._captured[1]
            for weight, place in zip(weights.values(), captured.gradients, strict=True):
                # the graphs write over what another part of the same step has left, and is to be added to
                if place is not None and weight.grad is not None and weight.grad.data_ptr() == place.data_ptr():
                    weight.grad = weight.grad.clone()
            output: Tensor = _Replayed.apply(captured, there, *weights.values())
        return output


class _Replayed(torch.autograd.Function):
    """Inputs -> output, whose gradient goes to the weights; these lie where the graphs read them."""

    @staticmethod
    def forward(ctx: Any, captured: _Captured, given: Sequence[Tensor], *_: Tensor) -> Tensor:
        for place, value in zip(captured.inputs, given, strict=True):
            place.copy_(value, non_blocking=True)
        captured.forward.replay()
        captured.replays += 1
        ctx.captured, ctx.replay = captured, captured.replays
        return captured.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        captured: _Captured = ctx.captured
        if ctx.replay != captured.replays:
            raise RuntimeError(
                "another evaluation, or gradient, came before this one: stage.cuda_graphs=false allows it"
            )
        captured.replays += 1  # what this one needs is gone then
        captured.output_gradient.copy_(gradient)
        captured.backward.replay()
        return None, None, *(None if place is None else place.detach() for place in captured.gradients)


def _capture(
    denoiser: EDMPreconditioner,
    given: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    precision: torch.dtype | None,
) -> _Captured:
    device = next(iter(weights.values())).device
    # the same memory as other leaves: what waits for the gradients of the weights themselves is not to be captured
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    places = [None if value is None else _place(value, device) for value in given]
    x, sigma, labels, augment_labels, images, level = places
    assert x is not None
    assert sigma is not None
    condition = None if images is None or level is None else Condition(images, level)

    def evaluate() -> Tensor:
        with torch.autocast("cuda", dtype=precision, enabled=precision is not None, cache_enabled=False):
            output: Tensor = functional_call(denoiser, leaves, (x, sigma, labels, augment_labels, condition))
            return output

    def differentiate(output: Tensor, gradient: Tensor) -> list[Tensor | None]:
        with torch.autocast("cuda", enabled=False):  # as a backward pass is run
            return _apart(torch.autograd.grad(output, list(leaves.values()), gradient, allow_unused=True))

    state = torch.cuda.get_rng_state(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            output = evaluate()
            differentiate(output, torch.zeros_like(output))
        del output
    torch.cuda.current_stream().wait_stream(side)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    # other threads, which load data and talk to other devices, may go on
    with torch.cuda.graph(forward, capture_error_mode="thread_local"):
        output = evaluate()
    output_gradient = torch.zeros_like(output)
    with torch.cuda.graph(backward, pool=forward.pool(), capture_error_mode="thread_local"):
        gradients = differentiate(output, output_gradient)
    torch.cuda.set_rng_state(state, device)
    inputs = [place for place in places if place is not None]
    return _Captured(forward, backward, inputs, output.detach(), output_gradient, gradients)


def _apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients that share memory, as those of two terms of a sum do, each in memory of its own."""
    kept: list[Tensor | None] = []
    seen: set[int] = set()
    for gradient in gradients:
        shared = gradient is not None and gradient.data_ptr() in seen
        kept.append(gradient.clone() if gradient is not None and shared else gradient)
        seen |= set() if gradient is None else {gradient.data_ptr()}
    return kept


def _place(value: Tensor, device: torch.device) -> Tensor:
    """Memory of its own for an input, filled with it."""
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return torch.empty_like(value, dtype=dtype, device=device).copy_(value)
