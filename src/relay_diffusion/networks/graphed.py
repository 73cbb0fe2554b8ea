"""A denoiser replayed from a CUDA graph: launching a thousand kernels one by one can take longer than running them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from relay_diffusion.networks.blocks import ResidualBlock
from relay_diffusion.networks.preconditioning import EDMPreconditioner

MAX_GRAPHS = 2  # shapes kept: guidance evaluates one and two batches in turns


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor
    cast: dict[str, Tensor]  # weights in the precision of the products
    version: int  # of the weights when they were cast


class Graphed:
    """The denoiser, captured at the second evaluation of a shape and replayed from then on: the same numbers.

    The first evaluation runs as usual: libraries choose their kernels there. Weights are cast to the precision of
    autocast once, and again when they have changed in place. Without a GPU, or where gradients are wanted, it is the
    denoiser itself.
    """

    def __init__(self, denoiser: EDMPreconditioner) -> None:
        self.denoiser = denoiser
        self._weights = list(denoiser.parameters())
        self._graphs: dict[Any, _Captured | None] = {}

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """x [B,C,H,W], sigma [B], labels [B] or None -> estimate of x0, float32."""
        if not x.is_cuda or torch.is_grad_enabled():
            return self.denoiser(x, sigma, labels)
        with torch.cuda.device_of(x):
            return self._replayed(x, sigma, labels)

    def _replayed(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        where = hash(tuple(weight.data_ptr() for weight in self._weights))
        key = (tuple(x.shape), labels is None, precision, where)
        if key not in self._graphs:
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = None
            return self.denoiser(x, sigma, labels)
        given = [x, sigma] if labels is None else [x, sigma, labels]
        captured = self._graphs[key]
        if captured is None:
            # what is captured serves evaluations with and without inference mode
            with torch.inference_mode(False), torch.no_grad():
                captured = self._graphs[key] = self._capture(given, precision)
        if captured.version != self._version():
            self._cast(captured.cast)
            captured.version = self._version()
        for place, value in zip(captured.inputs, given, strict=True):
            place.copy_(value, non_blocking=True)
        captured.graph.replay()
        return captured.output.clone()

    def _version(self) -> int:
        return sum(weight._version for weight in self._weights if not weight.is_inference())

    def _cast(self, places: dict[str, Tensor]) -> None:
        if not places:  # computed in float32
            return
        torch._foreach_copy_(list(places.values()), [self.denoiser.get_parameter(name) for name in places])

    def _capture(self, given: list[Tensor], precision: torch.dtype | None) -> _Captured:
        device = given[0].device
        inputs = [value.to(device, torch.float32 if value.is_floating_point() else value.dtype) for value in given]
        inputs = [torch.empty_like(value).copy_(value) for value in inputs]  # memory of its own
        weights = self._cast_by_autocast() if precision is not None else {}
        cast = {name: torch.empty_like(weight, dtype=precision) for name, weight in weights.items()}
        self._cast(cast)
        graph = torch.cuda.CUDAGraph()
        autocast = torch.autocast("cuda", dtype=precision, enabled=precision is not None, cache_enabled=False)
        # other threads, which load data, may go on
        with torch.cuda.graph(graph, capture_error_mode="thread_local"), autocast:
            output = functional_call(self.denoiser, cast, tuple(inputs))
        return _Captured(graph, inputs, output, cast, self._version())

    def _cast_by_autocast(self) -> dict[str, Tensor]:
        """Weights of products, but for those that are computed with in float32 before they are cast."""
        modules = dict(self.denoiser.named_modules())
        blocks = [module for module in modules.values() if isinstance(module, ResidualBlock) and module.up]
        computed_with = [self.denoiser.network.conv_in, *(block.conv0 for block in blocks)]
        products = {k: m for k, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear) and m not in computed_with}
        return {f"{name}.weight": module.weight for name, module in products.items()}
