"""Read numbers of the device one step late, so that no step waits for it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Delayed:
    """A number of the device as of the previous call."""

    def __init__(self, device: torch.device) -> None:
        self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._ready = torch.cuda.Event() if device.type == "cuda" else None

    def exchange(self, value: Tensor) -> int:
        """Store an int32 `value` of one element; return that of the previous call, at first 0."""
        if self._ready is not None:
            self._ready.synchronize()  # of the step before: the device is busy with this one
        before = int(self._seen)
        self._seen.copy_(value, non_blocking=True)
        if self._ready is not None:
            self._ready.record()
        return before


class Agreement:
    """The maximum over all ranks as of the previous call, so that no rank waits."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros(1, dtype=torch.int32, device=device)
        self._delayed = Delayed(device)

    def largest(self, mine: int) -> int:
        """Reduce `mine`; return the maximum of the previous call. Collective."""
        self._sum.fill_(mine)
        dist.all_reduce(self._sum, dist.ReduceOp.MAX)
        return self._delayed.exchange(self._sum)
