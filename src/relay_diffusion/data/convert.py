"""Make an image zip from a folder, zip or tar: `python -m relay_diffusion.data.convert source=... destination=...`.

One zip at the highest resolution serves every stage: a relay stage ends its forward process at block *means*, so the
lower stages box-average this zip while they load it (`resolution`). A second zip made with another filter
would not match.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import TracebackType

from omegaconf import MISSING
from PIL import Image

from relay_diffusion.data.arguments import run_tool
from relay_diffusion.data.sources import (
    LABEL_FILE,
    Labels,
    Source,
    box_average,
    decode_rgb,
    map_in_order,
    open_source,
    read_labels,
)
from relay_diffusion.errors import UserError
from relay_diffusion.progress import progress

USAGE = """\
python -m relay_diffusion.data.convert source=FOLDER|ZIP|TAR destination=OUT.zip [key=value ...]

  source       folder, zip or tar (also .tar.gz) of PNG, WebP and JPEG images, in sub-folders or not
  destination  the zip to write: PNG files and dataset.json
  resolution   side of the written images in pixels (256); make ONE zip at the highest resolution you train,
               lower stages average its blocks while loading
  crop         center: cut the middle square out (default) | none: refuse images that are not square
  classes      folders: an image's class is its first folder (default) | keep: the source's dataset.json | none
  skip_bad     false: stop at the first unusable image (default) | true: leave such images out and name them
"""
EPOCH = (1980, 1, 1, 0, 0, 0)  # one time stamp for all members, so that the same images give the same bytes


class Crop(Enum):
    """How an image becomes square."""

    center = "center"
    none = "none"


class Classes(Enum):
    """Where class labels come from."""

    folders = "folders"
    keep = "keep"
    none = "none"


@dataclass
class ConvertOptions:
    """The command line of this tool; see USAGE."""

    source: str = MISSING
    destination: str = MISSING
    resolution: int = 256
    crop: Crop = Crop.center
    classes: Classes = Classes.folders
    skip_bad: bool = False


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: image count, class names (None without classes), why images were left out."""

    images: int
    class_names: list[str] | None
    left_out: list[str]


class ImageZipWriter:
    """Writes an image zip: uncompressed PNG members and dataset.json; a context manager.

    The zip appears at `destination` when the block ends well and not at all otherwise. The same images in the same
    order give the same bytes. Errors: UserError when `destination` is no .zip name or a name comes twice.
    """

    def __init__(self, destination: str | Path, class_names: list[str] | None = None) -> None:
        self.destination = Path(destination).expanduser()
        if self.destination.suffix != ".zip":
            raise UserError(f"destination={destination}: the name must end in .zip")
        self.class_names = class_names
        self.labels: dict[str, int | None] = {}  # of every image written, in order
        self._temporary = self.destination.with_name(f".{self.destination.name}.{os.getpid()}.partial")

    def __enter__(self) -> ImageZipWriter:
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        self._zip = zipfile.ZipFile(self._temporary, "w", zipfile.ZIP_STORED)
        return self

    def add(self, name: str, image: Image.Image, label: int | None = None) -> None:
        """Add one picture as a PNG; `label` is an index into the class names, None when there are none."""
        self.add_encoded(name, encode_png(image), label)

    def add_encoded(self, name: str, content: bytes, label: int | None = None) -> None:
        """Add one picture that is encoded already (encoding can run in threads, this cannot)."""
        if name in self.labels:
            raise UserError(f"destination={self.destination}: two images would be named {name!r}")
        assert (label is None) == (self.class_names is None), "all images have a label, or none has"
        assert label is None or 0 <= label < len(self.class_names or ()), f"no class {label}"
        self.labels[name] = label
        self._write(name, content)

    def _write(self, name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name, EPOCH)
        info.create_system, info.external_attr = 3, 0o644 << 16  # the same on every operating system
        self._zip.writestr(info, data)

    def _dataset_json(self) -> str:
        if self.class_names is None:
            return json.dumps({"labels": None})
        return json.dumps({"labels": list(self.labels.items()), "classes": self.class_names})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._zip:
                if kind is None:
                    self._write(LABEL_FILE, self._dataset_json().encode())
            if kind is None:
                self._temporary.replace(self.destination)
        finally:
            self._temporary.unlink(missing_ok=True)


def encode_webp(image: Image.Image) -> bytes:
    """Lossless WebP bytes at the highest effort: a fifth smaller than PNG, much slower to write."""
    stream = BytesIO()
    image.save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes, at zlib's default effort: the highest takes four times as long for 2 % less."""
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def fit(image: Image.Image, resolution: int, crop: Crop, where: str) -> Image.Image:
    """Crop to a square and shrink to `resolution`: block means for an integer factor, Lanczos otherwise.

    Errors: UserError that names the image and its size when it is not square (crop=none) or too small.
    """
    width, height = image.size
    side = min(width, height)
    if side < resolution:
        raise UserError(f"{where} is {width}x{height}, smaller than resolution={resolution}")
    if width != height:
        if crop is Crop.none:
            raise UserError(f"{where} is {width}x{height}, not square; crop=center takes its middle")
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side % resolution == 0:
        return box_average(image, side // resolution)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


def convert(options: ConvertOptions) -> Converted:
    """Write the image zip that `options` describe. Errors: UserError; nothing is left at the destination then."""
    if options.resolution < 1:
        raise UserError(f"resolution={options.resolution}: must be at least 1")
    source = open_source(options.source, option="source")
    destination = Path(options.destination).expanduser()
    if destination.exists() and destination.samefile(source.path):
        raise UserError(f"destination={options.destination}: is the source itself; choose another name")
    labels = _labels(source, options.classes)
    targets = png_names(source.names)

    def encode(item: tuple[str, Callable[[], bytes]]) -> tuple[str, bytes | UserError]:
        name, read = item
        where = source.where(name)
        try:
            image = fit(decode_rgb(read(), where), options.resolution, options.crop, where)
        except UserError as error:
            return name, error
        return name, encode_png(image)

    left_out: list[str] = []
    class_names = labels.class_names if labels else None
    with (
        progress("converting", len(source.names)) as advance,
        ImageZipWriter(destination, class_names) as writer,
    ):
        for name, result in map_in_order(encode, source.items()):
            if isinstance(result, bytes):
                writer.add_encoded(targets[name], result, labels.by_name[name] if labels else None)
            elif options.skip_bad:
                left_out.append(str(result))
            else:
                raise UserError(f"source: {result} (skip_bad=true leaves such images out)") from result
            advance()
        if not writer.labels:
            raise UserError(f"source={options.source}: none of {len(left_out)} images is usable; {left_out[0]}")
    return Converted(len(writer.labels), class_names, left_out)


def _labels(source: Source, classes: Classes) -> Labels | None:
    if classes is Classes.none:
        return None
    kept = read_labels(source)
    if classes is Classes.keep:
        if kept is None:
            raise UserError(f"classes=keep: {source.path} has no labels in {LABEL_FILE}")
        return kept
    if kept is not None:
        raise UserError(
            f"classes=folders: {source.path} has labels of its own in {LABEL_FILE}; "
            f"classes=keep takes them, classes=none drops them"
        )
    folders = {}
    for name in source.names:
        folder, slash, _ = name.partition("/")
        if not slash:
            raise UserError(f"classes=folders: {source.where(name)} is in no folder; use classes=none")
        folders[name] = folder
    class_names = sorted(set(folders.values()))
    index = {folder: position for position, folder in enumerate(class_names)}
    return Labels({name: index[folder] for name, folder in folders.items()}, class_names)


def png_names(names: list[str]) -> dict[str, str]:
    """Names of images -> as PNG: a/x.jpg -> a/x.png; but x.jpg beside x.png -> x.jpg.png and x.png.png."""
    stems = {name: str(PurePosixPath(name).with_suffix("")) for name in names}
    uses = Counter(stems.values())
    return {name: f"{stem if uses[stem] == 1 else name}.png" for name, stem in stems.items()}


def _convert_and_report(options: ConvertOptions) -> None:
    result = convert(options)
    for line in result.left_out:
        print(f"left out: {line}", file=sys.stderr)
    classes = f"{len(result.class_names)} classes" if result.class_names else "no classes"
    print(
        f"{options.destination}: {result.images:,} images of {options.resolution}x{options.resolution}, {classes}, "
        f"{len(result.left_out):,} left out"
    )


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], USAGE, ConvertOptions, _convert_and_report))
