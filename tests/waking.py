"""Networks of which every layer counts."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.nn import Module

AnyModule = TypeVar("AnyModule", bound=Module)


def awake(module: AnyModule) -> AnyModule:
    """In evaluation mode, with random weights in the layers that start at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module.eval()
