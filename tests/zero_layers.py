"""Random weights for the layers that start at zero."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.nn import Module

AnyModule = TypeVar("AnyModule", bound=Module)


def randomize_zero_layers(module: AnyModule) -> AnyModule:
    """Fill the layers that start at zero, and set evaluation mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module.eval()
