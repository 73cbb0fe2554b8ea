"""Image data: archives and folders of images, their loading in training order, and the tools that make archives."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay_diffusion.data.datamodule import ImageDataModule
    from relay_diffusion.data.dataset import ImageDataset

__all__ = ["ImageDataModule", "ImageDataset"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line tools of this package need neither torch nor lightning.
    homes = {"ImageDataModule": "datamodule", "ImageDataset": "dataset"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
