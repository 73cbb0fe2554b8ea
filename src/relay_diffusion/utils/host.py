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

THREADS, THREADS_KEY = 4, "OMP_NUM_THREADS"  # limit of CPU threads on a host with a GPU
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, from malloc.h


def report_slow_settings(device: torch.device, networks: Mapping[str, object]) -> None:
    """Print settings that slow down a run on a GPU; `networks`: by the option that sets channels_last."""
    import torch

    if device.type != "cuda":
        return
    slow = "and the fused kernels are not used"
    if importlib.util.find_spec("triton") is None:
        print(f"note: Triton is not installed, {slow}: slower, same images; pip install triton", flush=True)
    for option, network in networks.items():
        # networks of other packages have no memory_format
        if getattr(network, "memory_format", torch.channels_last) is not torch.channels_last:
            print(f"note: {option}=false is slow on a GPU, {slow}: same numbers with true", flush=True)


def prepare_host(device: torch.device) -> None:
    """Limit torch to few threads beside a GPU; keep freed memory on a CPU.

    Beside a GPU the CPU only copies batches: a few threads are far faster than one for each of many cores, above all
    with several ranks on a host. A user's OMP_NUM_THREADS is kept. On the CPU glibc returns the memory of large tensors
    to the system, which clears their pages for the next ones: 44 % of the time of an evaluation of emoji_256.
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
