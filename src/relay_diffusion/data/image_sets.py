"""Image sets: a folder, an image zip, or an .npz.

The .npz has ADM's sample format, with any number of channels. Images are streamed; no set is held in memory.
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

from relay_diffusion.data.captions import read_captions
from relay_diffusion.data.decode import (
    EXIF_APPLIED,
    FULL_DEPTH,
    MODES,
    UNUSED_BITS,
    Decoded,
    block_means,
    box_average,
    dark_warning,
    with_channels,
)
from relay_diffusion.data.labels import MAX_CLASSES, Labels, read_labels
from relay_diffusion.data.npz import Npz
from relay_diffusion.data.sources import CONVERTER, Source, SourceFormat, existing_path, open_source
from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.errors import UserError
from relay_diffusion.utils.alpha import RGBA, premultiplied
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.pictures import pil_image
from relay_diffusion.utils.resolution import MAX_PIXELS, size_text

IMAGES_KEY, LABELS_KEY = "arr_0", "arr_1"  # numpy.savez's names of its arrays, which ADM uses for samples
INSPECTED = 16  # evenly spaced images of a set whose size and 16-bit range are checked before it is used
MAX_CHANNELS = 1024  # of an image: a header with more is damaged or hostile
SKIP_BAD = f"convert with skip_bad=true ({CONVERTER[1:-1]})"


class ImageSet(ABC):
    """Images of one size in a fixed order.

    kind: "folder", "zip", "file" or "npz". names [N]: names of the images, for messages and files. resolution: (H, W).
    channels: C. averaging: the factors by which the images read so far were box-averaged; 1: not averaged.
    conversions: the conversions of these images to C channels. turned: names of images whose EXIF orientation this
    process has applied. no_captions: the message for a set without any captions.
    """

    no_captions = Source.no_captions
    kind: str
    path: Path | str
    names: Sequence[str]
    resolution: tuple[int, int]

    def __init__(self, channels: int = 3) -> None:
        self.channels = channels
        self.averaging: set[int] = set()
        self.conversions: set[str] = set()
        self.turned: set[str] = set()

    def __len__(self) -> int:
        return len(self.names)

    @property
    @abstractmethod
    def source_hash(self) -> str:
        """Hash of names, contents and resolution (hexadecimal).

        No image is decoded.
        """

    @abstractmethod
    def digest(self, header: str) -> str:
        """Hash a header, the choices of this set, and names and contents."""

    @abstractmethod
    def tensors(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield the images of ascending indices: [C,H,W], uint8 or float32 in [-1, 1].

        Colors of RGBA are premultiplied (`utils.alpha`). Raises UserError for an image that cannot be read or has
        another size.
        """

    def tensor(self, index: int) -> Tensor:
        """Return one image, as `tensors` does."""
        return next(iter(self.tensors([index])))

    def labels(self) -> Labels | None:
        """Read the class labels of the whole set; None without labels."""
        return None

    def captions(self) -> dict[str, list[str]]:
        """Read the captions of the whole set by name.

        Images without captions have no entry.
        """
        return {}

    def batches(self, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yield images as uint8 [B,C,H,W].

        Colors of RGBA are premultiplied. All images or those of ascending `indices`; the last batch may be smaller.
        Raises UserError for an image that cannot be read or has another size, ValueError for other indices.
        """
        wanted = range(len(self)) if indices is None else indices
        previous = -1
        for index in wanted:
            if not previous < index < len(self):
                raise ValueError(f"index {index} after {previous}: indices must ascend within {len(self)} images")
            previous = index
        batch: list[Tensor] = []
        for image in self.tensors(wanted):
            batch.append(_eight_bits(image))
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)


class ImageFiles(ImageSet):
    """Image files of a folder or zip; thread-safe.

    Also a single image file. resolution: (H, W); images of a multiple of it are box-averaged. None: that of the first
    image, and all must have it. subset: a folder inside. apply_exif: apply the EXIF orientation. channels: as in
    `decode`. whole: images may have any size from the resolution on and are not averaged. Raises UserError naming the
    option and the image.
    """

    def __init__(
        self,
        source: Source,
        resolution: tuple[int, int] | None = None,
        subset: str = "",
        apply_exif: bool = True,
        channels: int = 3,
        whole: bool = False,
    ) -> None:
        super().__init__(channels)
        if channels not in MODES:
            raise UserError(
                f"{source.option}={source.path}: channels={channels}: image files have 1 (grayscale), 3 (RGB) or 4 "
                "(RGBA); use an .npz"
            )
        self.kind, self.path, self.names = source.kind, source.path, source.names_in(subset)
        self._source, self._subset, self._apply_exif = source, subset.strip("/"), apply_exif
        self.no_captions = source.no_captions
        self._whole, self._reduces = whole, resolution is not None
        if resolution is None:
            first = self._decoded(self.names[0]).image
            resolution = (first.height, first.width)
        self.resolution = resolution
        chosen = self.names[:1] if self._reduces else self._inspected()
        for _ in map_in_order(self.image, chosen):  # a wrong resolution and mixed sizes fail early
            pass
        _warn_of_unused_range(source, self._inspected())
        note_ignored(source, subset)

    @cached_property
    def source_hash(self) -> str:
        """Hash of names, contents and resolution (hexadecimal).

        Of a zip only the directory is read; a folder is read once.
        """
        return self.digest("{}x{}\n".format(*self.resolution) + f"{self._subset}\n")

    def digest(self, header: str) -> str:
        """Hash a header, the choices of this set, names and contents."""
        exif = EXIF_APPLIED if self._apply_exif else ""
        contents = (f"{name}\n{self._source.fingerprint(name)}\n" for name in self.names)
        return digest([header, exif, _channels_line(self.channels), *contents])

    def labels(self) -> Labels | None:
        """Read the class labels in dataset.json; None without labels."""
        return read_labels(self._source)

    def captions(self) -> dict[str, list[str]]:
        """Read the captions in dataset.json by name."""
        return read_captions(self._source)

    def image(self, name: str) -> Image.Image:
        """Return one image at the resolution, or a whole one.

        Raises UserError if its size is not a multiple of the resolution, or smaller.
        """
        decoded = self._decoded(name)
        self.conversions |= decoded.conversions
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

    def _decoded(self, name: str) -> Decoded:
        """Decode one image. Raises UserError with the remedies."""
        try:
            return self._source.decoded(name, self._apply_exif, self.channels)
        except UserError as error:
            raise UserError(f"{error}, or {SKIP_BAD}" if self._source.convertible else str(error)) from error

    def _inspected(self) -> Sequence[str]:
        """Return a few evenly spaced names, with the first."""
        return self.names[:: -(-len(self.names) // INSPECTED)]

    def _wrong_size(self, name: str, image: Image.Image) -> str:
        height, width = self.resolution
        option, shown = self._source.option, f"is {image.width}x{image.height}"
        if self._reduces:
            remedy = f"{CONVERTER} crops and resizes" if self._source.convertible else "resize it, or use random_crops"
            wanted = f"it must be {width}x{height} or a whole multiple; {remedy}"
            return f"{option}: {self._source.where(name)} {shown}; {wanted}"
        return (
            f"{option}={self.path}: its images have several sizes ({self.names[0]!r} is {width}x{height}, {name!r} "
            f"{shown}); convert them to one size and use that zip: {CONVERTER[:-1]} source={self.path} "
            "destination=OUT.zip resolution=N classes=none`"
        )

    def tensor(self, index: int) -> Tensor:
        """Return one image, uint8 [C,H,W]."""
        return image_tensor(self.image(self.names[index]))

    def tensors(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield images, uint8 [C,H,W]."""
        return map_in_order(self.tensor, indices)


class ArraySet(ImageSet):
    """Images of the array `arr_0` in an .npz: [N,H,W,C], uint8 or floats in [-1, 1].

    See `open_image_set`. 1, 3 and 4 channels (grayscale, RGB, RGBA of straight colors) are converted to each other, in
    8 bits. Class indices: `arr_1`, [N]. Raises UserError for an .npz without such an array.
    """

    kind = "npz"

    def __init__(self, npz: Npz, resolution: tuple[int, int] | None, channels: int = 3) -> None:
        super().__init__(channels)
        self.path, self._npz = npz.path, npz
        if IMAGES_KEY not in npz.keys:
            found = ", ".join(npz.keys) or "nothing"
            raise UserError(f"{npz.where}: holds {found}, but no images as {IMAGES_KEY!r}")
        shape, fortran_order, dtype = npz.header(IMAGES_KEY)
        good = (dtype == np.uint8 or dtype.kind == "f") and not fortran_order and len(shape) == 4
        if not good or min(shape) < 1:
            order = " in Fortran order" if fortran_order else ""
            raise UserError(
                f"{npz.where}: {IMAGES_KEY!r} must hold images [N,H,W,C] as uint8 or as floats in [-1, 1], not {dtype} "
                f"{list(shape)}{order}"
            )
        stored = (shape[1], shape[2])
        if stored[0] * stored[1] > MAX_PIXELS or shape[3] > MAX_CHANNELS:
            raise UserError(
                f"{npz.where}: its images are {size_text(stored)} with {shape[3]:,} channels, but at most "
                f"{MAX_PIXELS:,} pixels and {MAX_CHANNELS:,} channels are supported; crop or shrink them"
            )
        self._converts = channels != shape[3]
        if self._converts and not {channels, shape[3]} <= MODES.keys():
            raise UserError(
                f"{npz.where}: its images have {shape[3]} channels, not {channels}; use other images, or in training "
                f"data.dataset.channels={shape[3]}"
            )
        factor = _factor(stored, resolution or stored)
        if factor is None:
            raise UserError(
                f"{npz.where}: its images are {size_text(stored)}; they must be {size_text(resolution or stored)} or a "
                "whole multiple; crop or resize them"
            )
        self._factor = factor
        self.averaging.add(factor)
        self.resolution = resolution or stored
        self.names = [f"{IMAGES_KEY}[{index}]" for index in range(shape[0])]

    @cached_property
    def source_hash(self) -> str:
        """Hash of the archive's directory and the resolution (hexadecimal)."""
        return self.digest("{}x{}\n".format(*self.resolution))

    def digest(self, header: str) -> str:
        """Hash a header, the channels, and the archive's directory."""
        return digest([header, _channels_line(self.channels), self._npz.fingerprint()])

    def labels(self) -> Labels | None:
        """Read the class indices in `arr_1`; None without them. Classes are named by number."""
        if LABELS_KEY not in self._npz.keys:
            return None
        shape, _, dtype = self._npz.header(LABELS_KEY)
        found = self._npz.read(LABELS_KEY).tolist() if dtype.kind in "iu" and shape == (len(self),) else [-1]
        if not all(0 <= label < MAX_CLASSES for label in found):
            raise UserError(
                f"{self._npz.where}: {LABELS_KEY!r} must hold a class index from 0 for each of {len(self)} images"
            )
        return Labels(dict(zip(self.names, found, strict=True)), [str(label) for label in range(max(found) + 1)])

    def tensors(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield images [C,H,W], uint8 or float32 in [-1, 1]."""
        for index, row in zip(indices, self._npz.rows(IMAGES_KEY, indices), strict=True):
            pixels = row if row.dtype == np.uint8 else row.astype(np.float32)
            if pixels is not row and not np.abs(pixels).max() <= 1:
                raise UserError(
                    f"{self._npz.where}: {self.names[index]} holds values outside [-1, 1]; store floats in [-1, 1], or "
                    "uint8"
                )
            image = torch.from_numpy(block_means(premultiplied(pixels), self._factor).transpose(2, 0, 1).copy())
            if self._converts:
                converted, conversions = with_channels(pil_image(_eight_bits(image)), self.channels)
                self.conversions |= conversions
                image = image_tensor(converted)
            yield image


def _eight_bits(image: Tensor) -> Tensor:
    return image if image.dtype == torch.uint8 else to_uint8(image)


def _channels_line(channels: int) -> str:
    """Return the part of a hash for the channels; empty for RGB."""
    return "" if channels == 3 else f"channels {channels_text(channels)}\n"


def channels_text(channels: int) -> str:
    """Return channels for a hash; RGBA had straight colors in older hashes."""
    return f"{channels} premultiplied" if channels == RGBA else str(channels)


def _factor(size: tuple[int, int], target: tuple[int, int]) -> int | None:
    """Return the integer factor from the target to a size.

    None if the size is not a multiple.
    """
    factor = size[0] // target[0]
    return factor if factor and size == (target[0] * factor, target[1] * factor) else None


def digest(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines (hexadecimal)."""
    hashed = hashlib.sha256()
    for line in lines:
        hashed.update(line.encode())
    return hashed.hexdigest()


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


@rank_zero_only
def note_ignored(source: Source, subset: str) -> None:
    """Print what a source holds besides images and labels."""
    if ignored := source.ignored_note(subset):
        print(f"note: {source.option}={source.path}: ignored {ignored}", flush=True)


def image_tensor(image: Image.Image) -> Tensor:
    """Convert an 8-bit image to uint8 [C,H,W].

    RGBA with straight colors becomes premultiplied; `pil_image` is the inverse.
    """
    pixels = torch.from_numpy(premultiplied(np.array(image)))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def evenly_spaced(count: int, size: int) -> list[int]:
    """Return `count` ascending, evenly spaced indices of `size` images.

    Names are sorted by class, so the first images would be of few classes.
    """
    return [index * size // count for index in range(count)]


def open_image_set(
    path: str | Path,
    option: str,
    resolution: tuple[int, int] | None = None,
    subset: str = "",
    channels: int = 3,
    apply_exif: bool = True,
    whole: bool = False,
    format: SourceFormat | None = None,
) -> ImageSet:
    """Open a folder, image zip, image, ADM sample .npz, or another format.

    The .npz holds `arr_0`, see ArraySet. option: its name in messages. resolution: (H, W) wanted; larger images are
    box-averaged if they are a multiple. None: the first image's, and all must have it. subset: a folder inside a folder
    or zip. channels: wanted; files have 1, 3 or 4 and are converted. apply_exif: apply the EXIF orientation of files.
    whole: files may have any size from the resolution on. format: opens the path instead. Raises UserError naming the
    option and the file.
    """
    if format is not None:
        return ImageFiles(format.open(path, option, subset), resolution, subset, apply_exif, channels, whole)
    expanded = existing_path(path, option)
    if expanded.suffix == ".npz" and expanded.is_file():
        if subset:
            raise UserError(f"{option}={path}: an .npz has no folders; leave out subset={subset!r}")
        if whole:
            raise UserError(f"{option}={path}: the images of an .npz have one size; use random_crops=0")
        return ArraySet(Npz(expanded, option), resolution, channels)
    inside = [name for name in ("images.zip", "images") if (expanded / name).exists()]
    if inside and (expanded / "settings.json").is_file():  # the directory also holds pictures of other sizes
        raise UserError(f"{option}={path}: is the directory of a run of sample.py; use {option}={expanded / inside[0]}")
    return ImageFiles(open_source(expanded, option), resolution, subset, apply_exif, channels, whole)
