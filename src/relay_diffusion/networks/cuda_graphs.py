"""CUDA graphs of denoisers, for sampling and training.

Launching a thousand kernels one by one can take longer than running them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.networks.layers import ResidualBlock
from relay_diffusion.networks.preconditioning import Condition, EDMPreconditioner

MAX_GRAPHS = 2  # captured shapes: guidance alternates between one and two batches
WARM_UP = 3  # evaluations before the capture, in which libraries choose their kernels


@dataclass
class _CapturedForward:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor
    cast: dict[str, Tensor]  # weights in the precision of the products
    version: int  # version of the weights when they were cast


class Graphed:
    """Denoiser captured in a CUDA graph, for sampling.

    Captured at the second evaluation of a shape and replayed afterwards, with bit-identical results. The first
    evaluation runs normally, because libraries choose their kernels in it. Weights are cast to autocast's precision
    once, and again after in-place changes. Without a GPU, or with gradients enabled, it calls the denoiser directly.
    """

    def __init__(self, denoiser: EDMPreconditioner) -> None:
        self.denoiser = denoiser
        self._weights = list(denoiser.parameters())
        self._graphs: dict[Any, _CapturedForward | None] = {}

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None, text: TextStates | None = None) -> Tensor:
        """Return the estimate of x0 [B,C,H,W], float32.

        x [B,C,H,W], sigma [B], labels [B] or None, text: B rows or None. The number of tokens, padding included, is
        part of the shape.
        """
        if not x.is_cuda or torch.is_grad_enabled():
            return self.denoiser(x, sigma, labels, text=text)
        with torch.cuda.device_of(x):
            return self._replayed(x, sigma, labels, text)

    def _replayed(self, x: Tensor, sigma: Tensor, labels: Tensor | None, text: TextStates | None) -> Tensor:
        precision = _precision()
        tokens = None if text is None else tuple(text.tokens.shape)
        key = (tuple(x.shape), labels is None, tokens, precision, _addresses(self._weights))
        if key not in self._graphs:
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = None
            return self.denoiser(x, sigma, labels, text=text)
        given = [x, sigma, labels, *_parts(text)]
        captured = self._graphs[key]
        if captured is None:
            # tensors of the capture are used with and without inference mode
            with torch.inference_mode(False), torch.no_grad():
                captured = self._graphs[key] = self._capture(given, precision)
        if captured.version != self._version():
            self._cast(captured.cast)
            captured.version = self._version()
        for place, value in zip(captured.inputs, _present(given), strict=True):
            place.copy_(value, non_blocking=True)
        captured.graph.replay()
        return captured.output.clone()

    def _version(self) -> int:
        return sum(weight._version for weight in self._weights if not weight.is_inference())

    def _cast(self, places: dict[str, Tensor]) -> None:
        if not places:  # these weights are used in float32
            return
        torch._foreach_copy_(list(places.values()), [self.denoiser.get_parameter(name) for name in places])

    def _capture(self, given: Sequence[Tensor | None], precision: torch.dtype | None) -> _CapturedForward:
        places = _places(given, self._weights[0].device)
        x, sigma, labels, *text = places
        weights = self._cast_by_autocast() if precision is not None else {}
        cast = {name: torch.empty_like(weight, dtype=precision) for name, weight in weights.items()}
        self._cast(cast)
        graph = torch.cuda.CUDAGraph()
        with _capturing(graph), _autocast(precision):
            output = functional_call(self.denoiser, cast, (x, sigma, labels, None, None, _text(text)))
        return _CapturedForward(graph, _present(places), output, cast, self._version())

    def _cast_by_autocast(self) -> dict[str, Tensor]:
        """Return the weights that autocast casts, by name.

        Weights that are computed with in float32 before the cast are left out.
        """
        modules = dict(self.denoiser.named_modules())
        blocks = [module for module in modules.values() if isinstance(module, ResidualBlock) and module.up]
        computed_with = [self.denoiser.network.conv_in, *(block.conv0 for block in blocks)]
        products = {k: m for k, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear) and m not in computed_with}
        return {f"{name}.weight": module.weight for name, module in products.items()}


@dataclass
class _CapturedStep:
    """Captured forward and backward graph with their input and output memory."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor
    output_gradient: Tensor
    gradients: list[Tensor | None]
    replays: int = 0


class GraphedTraining:
    """Denoiser with gradients, its forward and backward pass replayed.

    Results and random numbers are bit-identical. The capture at the first evaluation of a shape changes neither
    gradients nor the state of the generator. One shape is kept. Without a GPU, without gradients, or with activation
    checkpointing, it calls the denoiser directly. Raises RuntimeError for a network that cannot be captured, for a
    gradient of any evaluation but the last, and for a second gradient of one.
    """

    def __init__(self, denoiser: EDMPreconditioner) -> None:
        self.denoiser = denoiser
        self._again = any(isinstance(m, ResidualBlock) and m.checkpointed for m in denoiser.modules())
        self._parameters = dict(denoiser.named_parameters())
        self._captured: tuple[Any, _CapturedStep] | None = None

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        condition: Condition | None = None,
        text: TextStates | None = None,
    ) -> Tensor:
        """Return the estimate of x0, float32, as EDMPreconditioner.

        x [B,C,H,W], sigma [B], labels [B] or None, augment_labels [B,A] or None, text: B rows or None. The number of
        tokens, padding included, is part of the shape.
        """
        if not x.is_cuda or self._again or not torch.is_grad_enabled():
            return self.denoiser(x, sigma, labels, augment_labels, condition, text)
        given = [x, sigma, labels, augment_labels, *(condition or (None, None)), *_parts(text)]
        with torch.cuda.device_of(x):
            weights = {name: weight for name, weight in self._parameters.items() if weight.requires_grad}
            precision = _precision()
            shapes = [None if value is None else value.shape for value in given]
            key = (shapes, self.denoiser.training, precision, _addresses(weights.values()))
            if self._captured is None or self._captured[0] != key:
                self._captured = None  # free its memory before the next capture
                self._captured = key, _capture(self.denoiser, given, weights, precision)
            captured = self._captured[1]
            for weight, place in zip(weights.values(), captured.gradients, strict=True):
                # keep the gradients of an earlier micro-batch, which the graphs would overwrite
                if place is not None and weight.grad is not None and weight.grad.data_ptr() == place.data_ptr():
                    weight.grad = weight.grad.clone()
            output: Tensor = _Replayed.apply(captured, _present(given), *weights.values())  # type: ignore[no-untyped-call]
        return output


class _Replayed(torch.autograd.Function):
    """Autograd function that replays a captured step.

    Inputs -> output; the gradient goes to the weights, at the addresses that the graphs read.
    """

    @staticmethod
    def forward(ctx: Any, captured: _CapturedStep, given: Sequence[Tensor], *_: Tensor) -> Tensor:
        for place, value in zip(captured.inputs, given, strict=True):
            place.copy_(value, non_blocking=True)
        captured.forward.replay()
        captured.replays += 1
        ctx.captured, ctx.replay = captured, captured.replays
        return captured.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        captured: _CapturedStep = ctx.captured
        if ctx.replay != captured.replays:
            raise RuntimeError(
                "training graphs hold one evaluation and one gradient of it; set stage.cuda_graphs=false for more"
            )
        captured.replays += 1  # the memory of earlier evaluations is overwritten
        captured.output_gradient.copy_(gradient)
        captured.backward.replay()
        return None, None, *(None if place is None else place.detach() for place in captured.gradients)


def _capture(
    denoiser: EDMPreconditioner,
    given: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    precision: torch.dtype | None,
) -> _CapturedStep:
    device = next(iter(weights.values())).device
    # new leaves on the same memory: hooks on the weights themselves must not be captured
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    places = _places(given, device)
    x, sigma, labels, augment_labels, images, level, *text = places
    assert x is not None
    assert sigma is not None
    condition = None if images is None or level is None else Condition(images, level)

    def evaluate() -> Tensor:
        with _autocast(precision):
            inputs = x, sigma, labels, augment_labels, condition, _text(text)
            output: Tensor = functional_call(denoiser, leaves, inputs)
            return output

    def differentiate(output: Tensor, gradient: Tensor) -> list[Tensor | None]:
        with torch.autocast("cuda", enabled=False):  # as in a normal backward pass
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
    with _capturing(forward):
        output = evaluate()
    output_gradient = torch.zeros_like(output)
    with _capturing(backward, forward):
        gradients = differentiate(output, output_gradient)
    torch.cuda.set_rng_state(state, device)
    return _CapturedStep(forward, backward, _present(places), output.detach(), output_gradient, gradients)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, before: torch.cuda.CUDAGraph | None = None) -> Iterator[None]:
    """Capture the work in the block.

    before: a graph that shares its memory with this one, which is replayed after it. Threads for data loading and
    communication may call CUDA meanwhile. Garbage is not collected: freeing an older graph would invalidate the capture
    (https://github.com/pytorch/pytorch/pull/161037).
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        pool = None if before is None else before.pool()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        if collected:
            gc.enable()


def _apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Clone gradients that share memory.

    For example those of two terms of a sum.
    """
    kept: list[Tensor | None] = []
    seen: set[int] = set()
    for gradient in gradients:
        shared = gradient is not None and gradient.data_ptr() in seen
        kept.append(gradient.clone() if gradient is not None and shared else gradient)
        seen |= set() if gradient is None else {gradient.data_ptr()}
    return kept


def _precision() -> torch.dtype | None:
    """Return autocast's precision on the GPU; None without autocast."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _autocast(precision: torch.dtype | None) -> torch.autocast:
    """Enable autocast to `precision` inside a graph, without its cache.

    Casts inside a graph must not be reused by another call.
    """
    return torch.autocast("cuda", dtype=precision, enabled=precision is not None, cache_enabled=False)


def _addresses(weights: Iterable[Tensor]) -> int:
    """Hash the memory addresses of the weights, which a graph reads."""
    return hash(tuple(weight.data_ptr() for weight in weights))


def _places(values: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Allocate memory for the inputs and fill it."""
    return [None if value is None else _place(value, device) for value in values]


def _place(value: Tensor, device: torch.device) -> Tensor:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return torch.empty_like(value, dtype=dtype, device=device).copy_(value)


def _present(values: Sequence[Tensor | None]) -> list[Tensor]:
    return [value for value in values if value is not None]


def _parts(text: TextStates | None) -> tuple[Tensor | None, ...]:
    """Return the tensors of text; None for each without text."""
    return (None, None, None) if text is None else tuple(text)


def _text(parts: Sequence[Tensor | None]) -> TextStates | None:
    """Return the text of `_parts`."""
    tokens, mask, pooled = parts
    return None if tokens is None or mask is None or pooled is None else TextStates(tokens, mask, pooled)
