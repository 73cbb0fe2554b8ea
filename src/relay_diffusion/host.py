"""How torch uses the CPU and the memory of this host."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

THREADS, THREADS_KEY = 4, "OMP_NUM_THREADS"  # of torch on the CPU, beside a GPU
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def prepare_host(device: torch.device) -> None:
    """Few threads of torch beside a GPU; on the CPU freed memory is kept for the next tensor.

    Beside a GPU the CPU only copies batches; a thread for each of many cores does it far slower than a few, the more
    so with several runs or ranks on a host. OMP_NUM_THREADS, where the user has set it, is left as it is. On the CPU
    glibc gives large tensors back to the system, which clears their pages anew for the next: measured, 44 % of an
    evaluation of emoji_256.
    """
    if device.type == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    elif THREADS_KEY not in os.environ:
        torch.set_num_threads(min(THREADS, torch.get_num_threads()))
        os.environ[THREADS_KEY] = str(torch.get_num_threads())  # for other ranks, and so that Lightning keeps it
