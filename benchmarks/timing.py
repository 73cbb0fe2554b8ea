"""Functions for timing: environment, medians and spread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def pick_device(name: str) -> torch.device:
    """Return the device of an option; "auto" is the GPU if available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def environment() -> str:
    """Describe the machine and the libraries in one line."""
    processor = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}; {processor}"
        libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    else:
        device, libraries = processor, "no GPU"
    return f"{device}; torch {torch.__version__}, {libraries}, Python {platform.python_version()}"


def synchronize() -> None:
    """Synchronise a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_once(work: Callable[[], object]) -> float:
    """Time a first run, one-time work included."""
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def seconds(work: Callable[[], object], repeats: int = 7, warm_up: int = 3) -> list[float]:
    """Return sorted times of `work` in seconds.

    Warms up for at least `warm_up` runs and half a second.
    """
    begin, runs = time.perf_counter(), 0
    while runs < warm_up or time.perf_counter() - begin < 0.5:
        work()
        synchronize()
        runs += 1
    return sorted(seconds_once(work) for _ in range(repeats))


def seconds_on_device(work: Callable[[], object], repeats: int = 5) -> float:
    """Measure the GPU time of the kernels of `work` in seconds."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        for _ in range(repeats):
            work()
        synchronize()
    return sum(event.self_device_time_total for event in record.key_averages()) / repeats / 1e6


def line(name: str, times: list[float], images: int, baseline: float | None = None) -> str:
    """Format median, spread, images/s, and the ratio to a given images/s."""
    median = statistics.median(times)
    spread = f"({times[0] * 1e3:.2f}-{times[-1] * 1e3:.2f})"
    row = f"{name:44} {median * 1e3:9.2f} ms  {spread}  {images / median:8.1f} images/s"
    return row if baseline is None else f"{row}  {images / median / baseline:5.2f}x of {baseline:g}"


def launches(work: Callable[[], object]) -> int:
    """Count the computing operations of `work`, about its GPU kernels."""
    counter = _Launches()
    with counter:
        work()
    return counter.count


class _Launches(TorchDispatchMode):
    """Counter of operators except views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        free = func.is_view or "empty" in func.__name__ or func.__name__.startswith("_unsafe_view")
        if isinstance(result, torch.Tensor) and not free:
            self.count += result.is_cuda or not torch.cuda.is_available()
        return result
