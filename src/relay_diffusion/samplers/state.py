"""The precision of a sampler's running state."""

from __future__ import annotations

import torch


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it: hundreds of small steps add up (Apple's GPUs have none)."""
    return torch.float32 if device.type == "mps" else torch.float64
