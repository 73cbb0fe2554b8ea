"""Checkpoints and exports: read, loaded, written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay_diffusion.checkpoints.loading import load_relay, load_stage

__all__ = ["load_relay", "load_stage"]


def __getattr__(name: str) -> Any:
    # Imported on first use: checks of the configuration import this package without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from relay_diffusion.checkpoints import loading

    return getattr(loading, name)
