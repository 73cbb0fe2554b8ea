"""Finished sets of images to measure or to compare with: a folder, an image zip, or an .npz of ADM samples.

Everything streams: no set is ever held in memory.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from relay_diffusion.data.decode import EXIF_APPLIED, box_average
from relay_diffusion.data.depth import warn_of_unused_range
from relay_diffusion.data.npz import Npz
from relay_diffusion.data.sources import ImageSource, existing_path, open_images
from relay_diffusion.errors import UserError
from relay_diffusion.utils.parallel import map_in_order

IMAGES_KEY = "arr_0"  # what numpy.savez calls its first array: ADM's samples are written so
MAX_PIXELS = 2**27  # of one image; a file that claims more is damaged or hostile


class ImageSet(ABC):
    """Images of one size in a fixed order.

    kind: "folder", "zip", "file" or "npz". names [N]: what messages and files call the images. resolution: (H, W).
    averaging: the factors by which the images read so far were box-averaged; 1: as stored.
    """

    kind: str
    path: Path
    names: Sequence[str]
    resolution: tuple[int, int]

    def __init__(self) -> None:
        self.averaging: set[int] = set()

    def __len__(self) -> int:
        return len(self.names)

    @property
    @abstractmethod
    def source_hash(self) -> str:
        """Hex digest of the names, contents and resolution, without decoding an image."""

    @abstractmethod
    def _images(self, indices: Sequence[int]) -> Iterator[Image.Image]: ...

    def batches(self, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Images as uint8 [B,3,H,W], all or those of ascending `indices`; the last batch may be smaller.

        Raises UserError for an image that cannot be read or has another size, ValueError for other indices.
        """
        wanted = range(len(self)) if indices is None else indices
        previous = -1
        for index in wanted:
            if not previous < index < len(self):
                raise ValueError(f"index {index} after {previous}: indices must ascend within {len(self)} images")
            previous = index
        batch: list[Tensor] = []
        for image in self._images(wanted):
            batch.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)


class PictureSet(ImageSet):
    """Image files, turned as their EXIF orientation says, see `open_image_set`."""

    def __init__(self, source: ImageSource, option: str, resolution: tuple[int, int] | None, subset: str) -> None:
        super().__init__()
        self.kind = source.kind
        self.path, self._source, self._option, self._subset = source.path, source, option, subset.strip("/")
        self.names = [name for name in source.names if not self._subset or name.startswith(f"{self._subset}/")]
        if not self.names:
            raise UserError(f"{option}={source.path}: no images in its folder subset={subset!r}")
        first = self._decode(self.names[0])
        self._reduces = resolution is not None
        self.resolution = resolution or (first.height, first.width)
        self._fit(first, self.names[0])  # a wrong resolution shows here, before anything is built
        warn_of_unused_range(source, self.names)

    @cached_property
    def source_hash(self) -> str:
        """Hex digest: of the directory of a zip; a folder is read once."""
        lines = (f"{name}\n{self._source.fingerprint(name)}\n" for name in self.names)
        return _digest(self.resolution, [f"{self._subset}\n", EXIF_APPLIED, *lines])

    def _decode(self, name: str) -> Image.Image:
        return self._source.decoded(name).image

    def _fit(self, image: Image.Image, name: str) -> Image.Image:
        factor = _factor((image.height, image.width), self.resolution) if self._reduces else 1
        if factor is None or (image.height // factor, image.width // factor) != self.resolution:
            height, width = self.resolution
            wanted = (
                f"it must be {width}x{height} or a whole multiple"
                if self._reduces
                else f"{self.names[0]!r} is {width}x{height}, and all images must have one size"
            )
            raise UserError(f"{self._option}: {self._source.where(name)} is {image.width}x{image.height}; {wanted}")
        self.averaging.add(factor)
        return box_average(image, factor)

    def _images(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        read: Callable[[str], Image.Image] = lambda name: self._fit(self._decode(name), name)  # noqa: E731
        return map_in_order(read, (self.names[index] for index in indices))


class ArraySet(ImageSet):
    """uint8 images [N,H,W,3] in the array `arr_0` of an .npz, see `open_image_set`."""

    kind = "npz"

    def __init__(self, npz: Npz, resolution: tuple[int, int] | None) -> None:
        super().__init__()
        self.path, self._npz = npz.path, npz
        if IMAGES_KEY not in npz.keys:
            found = ", ".join(npz.keys) or "nothing"
            raise UserError(f"{npz.where}: holds {found}, but no images as {IMAGES_KEY!r}")
        shape, fortran_order, dtype = npz.header(IMAGES_KEY)
        good = dtype == np.uint8 and not fortran_order and len(shape) == 4 and shape[3] == 3
        if not good or min(shape) < 1 or shape[1] * shape[2] > MAX_PIXELS:
            order = " in Fortran order" if fortran_order else ""
            raise UserError(
                f"{npz.where}: {IMAGES_KEY!r} must hold images as uint8 [N,H,W,3], not {dtype} {list(shape)}{order}"
            )
        stored = (shape[1], shape[2])
        factor = _factor(stored, resolution or stored)
        if factor is None:
            raise UserError(
                f"{npz.where}: its images are {stored[1]}x{stored[0]}; they must be "
                f"{'x'.join(str(side) for side in reversed(resolution or stored))} or a whole multiple"
            )
        self._factor = factor
        self.averaging.add(factor)
        self.resolution = resolution or stored
        self.names = [f"{IMAGES_KEY}[{index}]" for index in range(shape[0])]

    @cached_property
    def source_hash(self) -> str:
        """Hex digest of the archive's directory."""
        return _digest(self.resolution, [self._npz.fingerprint()])

    def _images(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for row in self._npz.rows(IMAGES_KEY, indices):
            yield box_average(Image.fromarray(row), self._factor)


def _factor(size: tuple[int, int], target: tuple[int, int]) -> int | None:
    """How many times larger a size is than the target, None if it is no whole multiple."""
    factor = size[0] // target[0]
    return factor if factor and size == (target[0] * factor, target[1] * factor) else None


def _digest(resolution: tuple[int, int], lines: Iterable[str]) -> str:
    digest = hashlib.sha256(f"{resolution[0]}x{resolution[1]}\n".encode())
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()


def spread(count: int, size: int) -> list[int]:
    """Ascending indices of `count` of `size` images, evenly over the set: names are sorted by class."""
    return [index * size // count for index in range(count)]


def open_image_set(
    path: str | Path, option: str, resolution: tuple[int, int] | None = None, subset: str = ""
) -> ImageSet:
    """Open a folder, an image zip, an image or an ADM sample .npz (`arr_0`, uint8 [N,H,W,3]).

    option: its name in messages. resolution: (H, W) wanted; larger images are box-averaged if they are a multiple.
    None: the first image's, and all must have it. subset: a folder inside a folder or zip. Errors: UserError naming the
    option and the file.
    """
    expanded = existing_path(path, option)
    if expanded.suffix == ".npz" and expanded.is_file():
        if subset:
            raise UserError(f"{option}={path}: an .npz has no folders; leave out subset={subset!r}")
        return ArraySet(Npz(expanded, option), resolution)
    inside = [name for name in ("images.zip", "images") if (expanded / name).exists()]
    if inside and (expanded / "settings.json").is_file():  # beside them lie pictures of other sizes
        raise UserError(f"{option}={path}: is the directory of a run of sample.py; use {option}={expanded / inside[0]}")
    return PictureSet(open_images(expanded, option), option, resolution, subset)
