"""Image sets for evaluation: a folder, an image zip, or an .npz.

The .npz has ADM's sample format. Images are streamed; no set is held in memory.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor

from relay_diffusion.data.decode import EXIF_APPLIED, FULL_DEPTH, UNUSED_BITS, box_average, dark_warning
from relay_diffusion.data.npz import Npz
from relay_diffusion.data.sources import CONVERTER, Source, existing_path, open_source
from relay_diffusion.errors import UserError
from relay_diffusion.utils.parallel import map_in_order

IMAGES_KEY = "arr_0"  # numpy.savez's name of the first array, which ADM uses for samples
INSPECTED = 16  # evenly spaced images of a set whose size and 16-bit range are checked before it is used
MAX_PIXELS = 2**27  # limit of one image; a header with more is damaged or hostile


class ImageSet(ABC):
    """Images of one size in a fixed order.

    kind: "folder", "zip", "file" or "npz". names [N]: names of the images, for messages and files. resolution: (H, W).
    averaging: the factors by which the images read so far were box-averaged; 1: not averaged.
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
        """Hash of names, contents and resolution (hexadecimal).

        No image is decoded.
        """

    @abstractmethod
    def _images(self, indices: Sequence[int]) -> Iterator[Image.Image]: ...

    def batches(self, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yield images as uint8 [B,3,H,W].

        All images or those of ascending `indices`; the last batch may be smaller.
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
            batch.append(image_tensor(image))
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)


class ImageFiles(ImageSet):
    """Image files of a folder or zip; thread-safe.

    Also a single image file. resolution: (H, W); images of a multiple of it are box-averaged. None: that of the first
    image, and all must have it. subset: a folder inside. apply_exif: apply the EXIF orientation. whole: images may have
    any size from the resolution on and are not averaged.
    turned: names of the images that this process has turned. Raises UserError naming the option and the image.
    """

    def __init__(
        self,
        source: Source,
        resolution: tuple[int, int] | None = None,
        subset: str = "",
        apply_exif: bool = True,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.path, self.names = source.kind, source.path, source.names_in(subset)
        self.turned: set[str] = set()
        self._source, self._subset, self._apply_exif = source, subset.strip("/"), apply_exif
        self._whole, self._reduces = whole, resolution is not None
        if resolution is None:
            first = source.decoded(self.names[0], apply_exif).image
            resolution = (first.height, first.width)
        self.resolution = resolution
        chosen = self.names[:1] if self._reduces else self._inspected()
        for _ in map_in_order(self.image, chosen):  # a wrong resolution and mixed sizes fail early
            pass
        _warn_of_unused_range(source, self._inspected())

    @cached_property
    def source_hash(self) -> str:
        """Hash of names, contents and resolution (hexadecimal).

        Of a zip only the directory is read; a folder is read once.
        """
        return self.digest("{}x{}\n".format(*self.resolution) + f"{self._subset}\n")

    def digest(self, header: str) -> str:
        """Hash a header, the use of EXIF, and names and contents."""
        exif = EXIF_APPLIED if self._apply_exif else ""
        return _digest([header, exif, *(f"{name}\n{self._source.fingerprint(name)}\n" for name in self.names)])

    def image(self, name: str) -> Image.Image:
        """Return one image at the resolution, or a whole one.

        Raises UserError if its size is not a multiple of the resolution, or smaller.
        """
        decoded = self._source.decoded(name, self._apply_exif)
        if decoded.turned:
            self.turned.add(name)
        image = decoded.image
        if self._whole:
            height, width = self.resolution
            if image.height < height or image.width < width:
                raise UserError(
                    f"{self._source.option}: {self._source.where(name)} is {image.width}x{image.height}, smaller than "
                    f"{width}x{height}; remove it"
                )
            return image
        factor = _factor((image.height, image.width), self.resolution) if self._reduces else 1
        if factor is None or (image.height // factor, image.width // factor) != self.resolution:
            raise UserError(self._wrong_size(name, image))
        self.averaging.add(factor)
        return box_average(image, factor)

    def _inspected(self) -> Sequence[str]:
        """Return a few evenly spaced names, with the first."""
        return self.names[:: -(-len(self.names) // INSPECTED)]

    def _wrong_size(self, name: str, image: Image.Image) -> str:
        height, width = self.resolution
        option, shown = self._source.option, f"is {image.width}x{image.height}"
        if self._reduces:
            wanted = f"it must be {width}x{height} or a whole multiple; {CONVERTER} crops and resizes"
            return f"{option}: {self._source.where(name)} {shown}; {wanted}"
        return (
            f"{option}={self.path}: its images have several sizes ({self.names[0]!r} is {width}x{height}, {name!r} "
            f"{shown}); convert them to one size and use that zip: {CONVERTER[:-1]} source={self.path} "
            "destination=OUT.zip resolution=N classes=none`"
        )

    def _images(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        return map_in_order(self.image, (self.names[index] for index in indices))


class ArraySet(ImageSet):
    """Images of the array `arr_0` in an .npz, uint8 [N,H,W,3].

    See `open_image_set`. Raises UserError for an .npz without such an array.
    """

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
        """Hash of the archive's directory (hexadecimal)."""
        return _digest(["{}x{}\n".format(*self.resolution), self._npz.fingerprint()])

    def _images(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for row in self._npz.rows(IMAGES_KEY, indices):
            yield box_average(Image.fromarray(row), self._factor)


def _factor(size: tuple[int, int], target: tuple[int, int]) -> int | None:
    """Return the integer factor from the target to a size.

    None if the size is not a multiple.
    """
    factor = size[0] // target[0]
    return factor if factor and size == (target[0] * factor, target[1] * factor) else None


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()


@rank_zero_only
def _warn_of_unused_range(source: Source, names: Sequence[str]) -> None:
    """Print a warning if 16-bit images use little of their range.

    Less than a quarter of it, in a few decoded images.
    """
    with suppress(UserError):  # damaged images are reported on use
        if not source.decoded(names[0]).bits:
            return
        bits = max(decoded.bits for decoded in map_in_order(source.decoded, names))
        if bits <= FULL_DEPTH - UNUSED_BITS:
            what = f"{source.option}={source.path}: 16-bit images"
            print(dark_warning(what, bits, FULL_DEPTH, f"{CONVERTER} with "), file=sys.stderr, flush=True)


def image_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to uint8 [3,H,W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def evenly_spaced(count: int, size: int) -> list[int]:
    """Return `count` ascending, evenly spaced indices of `size` images.

    Names are sorted by class, so the first images would be of few classes.
    """
    return [index * size // count for index in range(count)]


def open_image_set(
    path: str | Path, option: str, resolution: tuple[int, int] | None = None, subset: str = ""
) -> ImageSet:
    """Open a folder, image zip, image or ADM sample .npz.

    The .npz holds `arr_0`, uint8 [N,H,W,3]. option: its name in messages. resolution: (H, W) wanted; larger images are
    box-averaged if they are a multiple. None: the first image's, and all must have it. subset: a folder inside a folder
    or zip. Raises UserError naming the option and the file.
    """
    expanded = existing_path(path, option)
    if expanded.suffix == ".npz" and expanded.is_file():
        if subset:
            raise UserError(f"{option}={path}: an .npz has no folders; leave out subset={subset!r}")
        return ArraySet(Npz(expanded, option), resolution)
    inside = [name for name in ("images.zip", "images") if (expanded / name).exists()]
    if inside and (expanded / "settings.json").is_file():  # the directory also holds pictures of other sizes
        raise UserError(f"{option}={path}: is the directory of a run of sample.py; use {option}={expanded / inside[0]}")
    return ImageFiles(open_source(expanded, option), resolution, subset)
