"""Dataset of uint8 image tensors from a zip or folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from relay_diffusion.data.image_sets import ImageFiles, evenly_spaced, image_tensor
from relay_diffusion.data.labels import read_labels
from relay_diffusion.data.sources import open_source
from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.errors import UserError
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.progress import progress


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images of a zip or folder with class indices, sorted by name.

    Items are (uint8 [3, R, R], class index or -1).
    path: an image zip, a folder (searched recursively) of PNG, WebP and JPEG files, or one such file.
    resolution: R; larger images whose side is a multiple of R are box-averaged, others are an error.
    subset: a top-level folder inside `path` ("train"); "" selects everything.
    labels: read classes from `dataset.json` if it exists.
    x_flip: indices N..2N-1 are the mirrored images 0..N-1, so mirroring is part of the data order.
    cache: decode everything once, at the first access, and keep it as one uint8 tensor in memory.
    exif: "apply" applies the EXIF orientation, "ignore" does not.
    option: the user's name of `path`, for messages.
    Attributes: `names` [N] and their `labels` [N]; `class_names` and `num_classes` of the whole set, not of the subset;
    `source_hash`, `path`, `subset`; `turned`, the names of images that this process has turned so far.
    Raises UserError that names the option, the argument, dataset.json or the image.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int,
        subset: str = "",
        labels: bool = True,
        x_flip: bool = False,
        cache: bool = False,
        exif: str = "apply",
        option: str = "data.dataset.path",
    ) -> None:
        self.resolution, self.subset, self.x_flip, self.cache = resolution, subset.strip("/"), x_flip, cache
        if resolution < 1:
            raise UserError(f"resolution={resolution}: must be at least 1")
        if exif not in ("apply", "ignore"):
            raise UserError(f"exif={exif}: use apply or ignore")
        source = open_source(path, option)
        self._files = ImageFiles(source, (resolution, resolution), subset, apply_exif=exif == "apply")
        self.path, self.names, self.turned = source.path, self._files.names, self._files.turned
        found = read_labels(source) if labels else None
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
        return self._files.digest(f"{self.subset}\n{self.resolution}\n")

    def __len__(self) -> int:
        return len(self.names) * (2 if self.x_flip else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the images uint8 [B,3,R,R] and labels [B] of B items."""
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
            images = torch.empty(len(self.names), 3, self.resolution, self.resolution, dtype=torch.uint8)
            with progress("decoding images", len(self.names), enabled=show_progress) as advance:
                for index, image in enumerate(map_in_order(self._decode, self.names)):
                    images[index] = image
                    advance()
            self._cached = images

    def _images(self, positions: list[int]) -> Tensor:
        self.load()
        if self._cached is not None:
            return self._cached[positions]
        return torch.stack([self._decode(self.names[position]) for position in positions])

    def _decode(self, name: str) -> Tensor:
        return image_tensor(self._files.image(name))


def batch_of(dataset: Dataset[tuple[Tensor, int]], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the images [B,C,H,W] and labels [B] of B items.

    A dataset with a method `batch` returns them at once, which is faster than item by item.
    """
    at_once = getattr(dataset, "batch", None)
    images, labels = default_collate([dataset[index] for index in indices]) if at_once is None else at_once(indices)
    return images, labels


def evenly_spaced_images(dataset: ImageDataset, numbers: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Return evenly spaced images and their labels.

    numbers: which of `count` evenly spaced images. Returns uint8 [B,C,H,W] and labels [B].
    """
    chosen = evenly_spaced(count, len(dataset.names))
    return batch_of(dataset, [chosen[number] for number in numbers])
