"""Image archives and folders, their conversion, and training batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay_diffusion.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from relay_diffusion.data.datamodule import ImageDataModule
    from relay_diffusion.data.dataset import ImageDataset

__all__ = ["ImageDataModule", "ImageDataset"]

# Command line tools must start without torch and lightning.
__getattr__ = lazy_exports(__name__, {"ImageDataModule": "datamodule", "ImageDataset": "dataset"})
