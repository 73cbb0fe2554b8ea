"""Dataset of uint8 image tensors from a zip or folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from relay_diffusion.data.crops import MAX_CROPS, random_crop
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
    x_flip: the second half of the indices are the mirrored items of the first half, so mirroring is part of the data
    order.
    cache: decode everything once, at the first access, and keep it in memory.
    exif: "apply" applies the EXIF orientation, "ignore" does not.
    random_crops: crops of each image, of random scale and position (`random_crop`); 0: whole images. The images may
    have any size from R on. Crop k of image i has the index k N + i and depends on k and i only.
    option: the user's name of `path`, for messages.
    Attributes: `names` [N] and their `labels` [N]; `class_names` and `num_classes` of the whole set, not of the subset;
    `source_hash`, `path`, `subset`; `cache`: all items are in memory, so that a loader needs no workers;
    `turned`, the names of images that this process has turned so far.
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
        random_crops: int = 0,
        option: str = "data.dataset.path",
    ) -> None:
        self.resolution, self.subset, self.x_flip, self.cache = resolution, subset.strip("/"), x_flip, cache
        if resolution < 1:
            raise UserError(f"resolution={resolution}: must be at least 1")
        if not 0 <= random_crops <= MAX_CROPS:
            raise UserError(f"random_crops={random_crops}: must be 0 to {MAX_CROPS:,}")
        self.random_crops = random_crops
        # cutting takes time, even from images in memory, so that a loader needs workers
        self._keeps_originals, self.cache = cache and random_crops > 0, cache and random_crops == 0
        if exif not in ("apply", "ignore"):
            raise UserError(f"exif={exif}: use apply or ignore")
        source = open_source(path, option)
        self._files = ImageFiles(source, (resolution, resolution), subset, exif == "apply", whole=random_crops > 0)
        self.path, self.names, self.turned = source.path, self._files.names, self._files.turned
        found = read_labels(source) if labels else None
        self.class_names: list[str] = found.class_names if found else []
        self.labels = [found.by_name[name] if found else NO_CLASS for name in self.names]
        self._cached: Tensor | None = None
        self._originals: list[Image.Image] = []

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @cached_property
    def source_hash(self) -> str:
        """Hash of names, contents, subset, resolution and exif (hexadecimal).

        x_flip and random_crops are not part of it. Fast for a zip, whose directory has a checksum of every file; a
        folder is read once.
        """
        return self._files.digest(f"{self.subset}\n{self.resolution}\n")

    def __len__(self) -> int:
        return self._unmirrored * (2 if self.x_flip else 1)

    @property
    def _unmirrored(self) -> int:
        return len(self.names) * max(1, self.random_crops)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the images uint8 [B,3,R,R] and labels [B] of B items."""
        count = len(self)
        for index in indices:
            if not -count <= index < count:
                raise IndexError(f"index {index} of a dataset with {count} items")
        items = [index % count % self._unmirrored for index in indices]
        flipped = [i for i, index in enumerate(indices) if index % count >= self._unmirrored]
        images = self._images(items)
        images[flipped] = images[flipped].flip(-1)
        return images, torch.tensor([self.labels[item % len(self.names)] for item in items])

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
        if self._keeps_originals and not self._originals:
            originals = []
            with progress("decoding images", len(self.names), enabled=show_progress) as advance:
                for original in map_in_order(self._files.image, self.names):
                    originals.append(original)
                    advance()
            self._originals = originals

    def _images(self, items: list[int]) -> Tensor:
        self.load()
        if self.random_crops:
            return torch.stack([self._crop(*divmod(item, len(self.names))) for item in items])
        if self._cached is not None:
            return self._cached[items]
        return torch.stack([self._decode(self.names[item]) for item in items])

    def _decode(self, name: str) -> Tensor:
        return image_tensor(self._files.image(name))

    def _crop(self, crop: int, position: int) -> Tensor:
        original = self._originals[position] if self._originals else self._files.image(self.names[position])
        return image_tensor(random_crop(original, self._files.resolution, (crop, position)))


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
