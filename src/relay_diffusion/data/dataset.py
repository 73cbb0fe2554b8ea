"""Dataset of uint8 image tensors from a zip or folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from relay_diffusion.data.image_sets import evenly_spaced, open_image_set
from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.errors import UserError
from relay_diffusion.utils.progress import progress
from relay_diffusion.utils.resolution import Resolution, image_size, resolution_of


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images of a zip or folder with class indices, sorted by name.

    Items are (uint8 [C, H, W], class index or -1).
    path: an image zip, a folder (searched recursively) of PNG, WebP and JPEG files, or one such file; or an .npz of
    images (`arr_0`, [N,H,W,C], uint8, or floats in [-1, 1], which stay floats) and class indices (`arr_1`, optional).
    resolution: R for H = W = R, or [height, width]; larger images are box-averaged if both sides are the same multiple,
    others are an error.
    subset: a top-level folder inside `path` ("train"); "" selects everything.
    labels: read classes from `dataset.json` or `arr_1` if they exist.
    x_flip: indices N..2N-1 are the mirrored images 0..N-1, so mirroring is part of the data order.
    cache: decode everything once, at the first access, and keep it as one tensor in memory; always for an .npz.
    exif: "apply" applies the EXIF orientation, "ignore" does not.
    channels: C; files and arrays of 1 (grayscale), 3 (RGB) and 4 (RGBA) channels are converted; others must have C.
    option: the user's name of `path`, for messages.
    Attributes: `names` [N] and their `labels` [N]; `class_names` and `num_classes` of the whole set, not of the subset;
    `source_hash`, `path`, `subset`; `size`, (H, W); `turned`, the names of images that this process has turned so far.
    Raises UserError that names the option, the argument, dataset.json or the image.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: Resolution,
        subset: str = "",
        labels: bool = True,
        x_flip: bool = False,
        cache: bool = False,
        exif: str = "apply",
        channels: int = 3,
        option: str = "data.dataset.path",
    ) -> None:
        self.subset, self.x_flip, self.channels = subset.strip("/"), x_flip, channels
        try:
            self.size = image_size(resolution)
        except ValueError as error:
            raise UserError(str(error)) from None
        if exif not in ("apply", "ignore"):
            raise UserError(f"exif={exif}: use apply or ignore")
        self._set = open_image_set(path, option, self.size, subset, channels, apply_exif=exif == "apply")
        self.cache = cache or self._set.kind == "npz"  # compressed, without random access
        self.path, self.names, self.turned = self._set.path, self._set.names, self._set.turned
        found = self._set.labels() if labels else None
        self.class_names: list[str] = found.class_names if found else []
        self.labels = [found.by_name[name] if found else NO_CLASS for name in self.names]
        self._cached: Tensor | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @cached_property
    def source_hash(self) -> str:
        """Hash of names, contents, subset, resolution and exif (hexadecimal).

        x_flip is not part of it. Fast for a zip, whose directory has a checksum of every file; a folder is read once.
        """
        return self._set.digest(f"{self.subset}\n{resolution_of(self.size)}\n")

    def __len__(self) -> int:
        return len(self.names) * (2 if self.x_flip else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the images [B,C,H,W] and labels [B] of B items."""
        count = len(self)
        for index in indices:
            if not -count <= index < count:
                raise IndexError(f"index {index} of a dataset with {count} items")
        positions = [index % count % len(self.names) for index in indices]
        flipped = [i for i, index in enumerate(indices) if index % count >= len(self.names)]
        images = self._images(positions)
        images[flipped] = images[flipped].flip(-1)
        return images, torch.tensor([self.labels[position] for position in positions])

    def load(self, show_progress: bool = True) -> None:
        """Decode all images now if cache=True.

        Call it before worker processes start.
        """
        if self.cache and self._cached is None:
            images = None
            with progress("decoding images", len(self.names), enabled=show_progress) as advance:
                for index, image in enumerate(self._set.tensors(range(len(self.names)))):
                    images = torch.empty(len(self.names), *image.shape, dtype=image.dtype) if images is None else images
                    images[index] = image
                    advance()
            self._cached = images

    def _images(self, positions: list[int]) -> Tensor:
        self.load()
        if self._cached is not None:
            return self._cached[positions]
        return torch.stack([self._set.tensor(position) for position in positions])


def evenly_spaced_images(dataset: ImageDataset, numbers: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Return evenly spaced images and their labels.

    numbers: which of `count` evenly spaced images. Returns uint8 [B,C,H,W] and labels [B].
    """
    chosen = evenly_spaced(count, len(dataset.names))
    return dataset.batch([chosen[number] for number in numbers])
