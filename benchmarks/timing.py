"""What every benchmark has in common: the environment in one line, medians with their spread, side by side."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch


def environment() -> str:
    """The machine and the libraries, in one line."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    else:
        device, libraries = platform.processor() or platform.machine(), f"{torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}, {libraries}, Python {platform.python_version()}"


def synchronize() -> None:
    """Wait for the device, if there is one to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int = 7, warm_up: int = 3) -> list[float]:
    """Times of `work`, sorted, after some runs that do not count."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)


def line(name: str, times: list[float], images: int, baseline: float | None = None) -> str:
    """One row: median, spread, images/s, and the ratio to a stated images/s."""
    median = statistics.median(times)
    spread = f"({times[0] * 1e3:.2f}-{times[-1] * 1e3:.2f})"
    row = f"{name:44} {median * 1e3:9.2f} ms  {spread}  {images / median:8.1f} images/s"
    return row if baseline is None else f"{row}  {images / median / baseline:5.2f}x of {baseline:g}"
