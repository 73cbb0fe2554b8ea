"""Image data: archives and folders of images, their loading in training order, and the tools that make archives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay_diffusion.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from relay_diffusion.data.datamodule import ImageDataModule
    from relay_diffusion.data.dataset import ImageDataset

__all__ = ["ImageDataModule", "ImageDataset"]

# The command line tools of this package need neither torch nor lightning.
__getattr__ = lazy_exports(__name__, {"ImageDataModule": "datamodule", "ImageDataset": "dataset"})
