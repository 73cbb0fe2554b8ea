"""Dataset of uint8 image tensors from files of any format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from relay_diffusion.data.crops import MAX_CROPS, random_crop
from relay_diffusion.data.image_sets import ArraySet, ImageFiles, evenly_spaced, image_tensor, open_image_set
from relay_diffusion.data.sources import SourceFormat
from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.errors import UserError
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.progress import progress
from relay_diffusion.utils.resolution import Resolution, image_size, resolution_of

T = TypeVar("T")


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images of a zip or folder with class indices, sorted by name.

    Items are (uint8 [C, H, W], class index or -1). Colors of RGBA are premultiplied (`utils.alpha`).
    path: an image zip, a folder (searched recursively) of PNG, WebP and JPEG files, or one such file; or an .npz of
    images (`arr_0`, [N,H,W,C], uint8, or floats in [-1, 1], which stay floats) and class indices (`arr_1`, optional).
    resolution: R for H = W = R, or [height, width]; larger images are box-averaged if both sides are the same multiple,
    others are an error.
    subset: a top-level folder inside `path` ("train"); "" selects everything.
    labels: read classes from `dataset.json` or `arr_1` if they exist.
    x_flip: the second half of the indices are the mirrored items of the first half, so mirroring is part of the data
    order.
    cache: decode everything once, at the first access, and keep it in memory; always for an .npz.
    exif: "apply" applies the EXIF orientation, "ignore" does not.
    random_crops: crops of each image, of random scale and position (`random_crop`); 0: whole images. The images may
    have any size from the resolution on. Crop k of image i has the index k N + i and depends on k and i only.
    channels: C; files and arrays of 1 (grayscale), 3 (RGB) and 4 (RGBA) channels are converted; others must have C.
    option: the user's name of `path`, for messages.
    format: another format of images (`data/huggingface.py`, `data/webdataset.py`), which opens `path` instead.
    Attributes: `names` [N], their `labels` [N] and `captions` [N]; `class_names` and `num_classes` of the whole set,
    not of the subset; `source_hash`, `path`, `subset`; `size`, (H, W); `cache`: all items are in memory, so that a
    loader needs no workers; `turned`, the names of images that this process has turned so far; `no_captions`, the
    message for a set without any captions.
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
        random_crops: int = 0,
        channels: int = 3,
        option: str = "data.dataset.path",
        format: SourceFormat | None = None,
    ) -> None:
        self.subset, self.x_flip, self.channels = subset.strip("/"), x_flip, channels
        try:
            self.size = image_size(resolution)
        except ValueError as error:
            raise UserError(str(error)) from None
        if not 0 <= random_crops <= MAX_CROPS:
            raise UserError(f"random_crops={random_crops}: must be 0 to {MAX_CROPS:,}")
        self.random_crops = random_crops
        if exif not in ("apply", "ignore"):
            raise UserError(f"exif={exif}: use apply or ignore")
        self._set = open_image_set(path, option, self.size, subset, channels, exif == "apply", random_crops > 0, format)
        # cutting takes time, even from images in memory, so that a loader needs workers
        self._keeps_originals, self.cache = cache and random_crops > 0, cache and random_crops == 0
        self.cache |= isinstance(self._set, ArraySet)  # compressed, without random access
        self.path, self.names, self.turned = self._set.path, self._set.names, self._set.turned
        self.no_captions = self._set.no_captions
        found = self._set.labels() if labels else None
        self.class_names: list[str] = found.class_names if found else []
        self.labels = [found.by_name[name] if found else NO_CLASS for name in self.names]
        self._cached: Tensor | None = None
        self._originals: list[Image.Image] = []

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @cached_property
    def captions(self) -> list[list[str]]:
        """Captions of every image [N] from dataset.json.

        An empty list for an image without captions. Read at the first access. Raises UserError that names the entry of
        dataset.json.
        """
        found = self._set.captions()
        return [found.get(name, []) for name in self.names]

    @cached_property
    def source_hash(self) -> str:
        """Hash of names, contents, subset, resolution and exif (hexadecimal).

        Labels, captions, x_flip and random_crops are not part of it. Fast for a zip, whose directory has a checksum of
        every file; a folder is read once.
        """
        return self._set.digest(f"{self.subset}\n{resolution_of(self.size)}\n")

    def __len__(self) -> int:
        return self._unmirrored * (2 if self.x_flip else 1)

    @property
    def _unmirrored(self) -> int:
        return len(self.names) * max(1, self.random_crops)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the images [B,C,H,W] and labels [B] of B items."""
        count = len(self)
        for index in indices:
            if not -count <= index < count:
                raise IndexError(f"index {index} of a dataset with {count} items")
        items = [index % count % self._unmirrored for index in indices]
        flipped = [i for i, index in enumerate(indices) if index % count >= self._unmirrored]
        images = self._images(items)
        images[flipped] = images[flipped].flip(-1)
        return images, torch.tensor([self.labels[self.image_of(item)] for item in items])

    def image_of(self, index: int) -> int:
        """Return which of the N images an item shows."""
        return index % len(self.names)

    def load(self, show_progress: bool = True) -> None:
        """Decode all images now if cache=True.

        Call it before worker processes start.
        """
        if self.cache and self._cached is None:
            images = None
            for index, image in enumerate(self._shown(self._set.tensors(range(len(self.names))), show_progress)):
                images = torch.empty(len(self.names), *image.shape, dtype=image.dtype) if images is None else images
                images[index] = image
            self._cached = images
        if self._keeps_originals and not self._originals:
            self._originals = list(self._shown(map_in_order(self._original, range(len(self.names))), show_progress))

    def _shown(self, decoded: Iterable[T], show_progress: bool) -> Iterator[T]:
        """Yield decoded images while a bar shows their progress."""
        with progress("decoding images", len(self.names), enabled=show_progress) as advance:
            for image in decoded:
                yield image
                advance()

    def _images(self, items: list[int]) -> Tensor:
        self.load()
        if self.random_crops:
            return torch.stack([self._crop(*divmod(item, len(self.names))) for item in items])
        if self._cached is not None:
            return self._cached[items]
        return torch.stack([self._set.tensor(item) for item in items])

    def _original(self, position: int) -> Image.Image:
        assert isinstance(self._set, ImageFiles)  # arrays have no crops
        return self._set.image(self.names[position])

    def _crop(self, crop: int, position: int) -> Tensor:
        original = self._originals[position] if self._originals else self._original(position)
        return image_tensor(random_crop(original, self.size, (crop, position)))


def batch_of(dataset: Dataset[tuple[Tensor, int]], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the images [B,C,H,W] and labels [B] of B items.

    A dataset with a method `batch` returns them at once, which is faster than item by item.
    """
    at_once = getattr(dataset, "batch", None)
    images, labels = default_collate([dataset[index] for index in indices]) if at_once is None else at_once(indices)
    return images, labels


def evenly_spaced_images(dataset: ImageDataset, numbers: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Return evenly spaced images and their labels.

    numbers: which of `count` evenly spaced images. Returns images [B,C,H,W] and labels [B].
    """
    chosen = evenly_spaced(count, len(dataset.names))
    return batch_of(dataset, [chosen[number] for number in numbers])
