"""Threads and memory of this host, and settings that are slow on it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

THREADS, THREADS_KEY = 4, "OMP_NUM_THREADS"  # of torch on the CPU, beside a GPU
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def slow_settings(device: str, have_triton: bool, channels_last: Mapping[str, bool]) -> list[str]:
    """List settings that slow down a run on a GPU, one line each.

    device: its type, as "cuda"; channels_last: whether each network has that memory format, by its option.
    """
    if device != "cuda":
        return []
    missing = [
        "note: Triton is not installed, so the fused kernels are not used: slower, the same images; pip install triton"
    ]
    contiguous = [
        f"note: {option}=false is slow on a GPU, and the fused kernels are not used: the same numbers with true"
        for option, is_last in channels_last.items()
        if not is_last
    ]
    return ([] if have_triton else missing) + contiguous


def report_slow_settings(device: torch.device, networks: Mapping[str, object]) -> None:
    """Print settings that slow down a run; `networks`: by the option that sets channels_last."""
    import torch

    formats = {
        option: network.memory_format is torch.channels_last
        for option, network in networks.items()
        if hasattr(network, "memory_format")  # the UNet of this package; another has options of its own
    }
    for line in slow_settings(device.type, importlib.util.find_spec("triton") is not None, formats):
        print(line, flush=True)


def prepare_host(device: torch.device) -> None:
    """Limit torch to few threads beside a GPU; keep freed memory on a CPU.

    Beside a GPU the CPU only copies batches; a thread for each of many cores does it far slower than a few, the more
    so with several runs or ranks on a host. OMP_NUM_THREADS, where the user has set it, is left as it is. On the CPU
    glibc gives large tensors back to the system, which clears their pages anew for the next: measured, 44 % of an
    evaluation of emoji_256.
    """
    import torch

    if device.type == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    elif THREADS_KEY not in os.environ:
        torch.set_num_threads(min(THREADS, torch.get_num_threads()))
        os.environ[THREADS_KEY] = str(torch.get_num_threads())  # for other ranks, and so that Lightning keeps it
