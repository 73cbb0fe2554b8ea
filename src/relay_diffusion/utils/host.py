"""Threads, memory and devices of this host."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from relay_diffusion.errors import UserError, require

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

THREADS, THREADS_KEY = 4, "OMP_NUM_THREADS"  # limit of CPU threads on a host with a GPU
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, from malloc.h


def prepare_host(device: torch.device) -> None:
    """Limit CPU threads beside a GPU; keep freed memory on a CPU.

    Beside a GPU the CPU only copies batches: a few threads are far faster than one per core, especially with several
    ranks on a host. A user's OMP_NUM_THREADS is kept. On the CPU glibc returns the memory of large tensors to the
    system, which must clear those pages again: 44 % of the time of an evaluation of emoji_256.
    """
    import torch

    if device.type == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    elif THREADS_KEY not in os.environ:
        torch.set_num_threads(min(THREADS, torch.get_num_threads()))
        os.environ[THREADS_KEY] = str(torch.get_num_threads())  # launched ranks inherit it, Lightning keeps it


def check_gpus(trainer: DictConfig) -> None:
    """Raise UserError if `trainer` needs GPUs that the host does not have."""
    import torch

    accelerator = trainer.accelerator
    missing = accelerator in ("gpu", "cuda") and not torch.cuda.is_available()
    if not missing or (accelerator == "gpu" and torch.backends.mps.is_available()):
        _check_devices(trainer.devices, accelerator)
        return
    if accelerator == "gpu" and not isinstance(trainer.strategy, str):  # as conf/strategy/ddp.yaml has it
        option, instead = "strategy=ddp", "use strategy=ddp_cpu"
    else:
        option, instead = f"trainer.accelerator={accelerator}", "use trainer.accelerator=cpu"
    raise UserError(f"{option} needs GPUs, and this host has none: {instead}, or leave it out")


def _check_devices(devices: int | str | Sequence[int], accelerator: str) -> None:
    """Raise UserError for GPUs that the host does not have."""
    import torch

    numbers = None if isinstance(devices, int | str) else list(devices)
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        count = torch.cuda.device_count()
        most = devices if isinstance(devices, int) else max(numbers or [0]) + 1
        numbered = "" if numbers is None else ", numbered from 0"
        require(most <= count, f"trainer.devices={devices}: this host has {count} GPUs{numbered}; use these, or auto")
    elif accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        require(numbers is None, f"trainer.devices={devices}: are numbers of GPUs; use a number of CPU processes, as 1")
