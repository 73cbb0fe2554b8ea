"""Make an image zip from a folder, zip or tar: `python -m relay_diffusion.data.convert source=... destination=...`.

One zip at the highest resolution serves every stage: a relay stage ends its forward process at block *means*, so the
lower stages box-average this zip while they load it (`resolution`). A second zip made with another filter
would not match.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath

from omegaconf import MISSING
from PIL import Image

from relay_diffusion.data.arguments import run_tool
from relay_diffusion.data.decode import box_average, decode_rgb
from relay_diffusion.data.sources import (
    LABEL_FILE,
    Labels,
    Source,
    map_in_order,
    open_source,
    read_labels,
)
from relay_diffusion.data.zip_writer import ImageZipWriter, encode_png, png_names
from relay_diffusion.errors import UserError
from relay_diffusion.progress import progress

MAX_ENDINGS = 8  # named in the line about files of other types
USAGE = """\
python -m relay_diffusion.data.convert source=FOLDER|ZIP|TAR destination=OUT.zip [key=value ...]

  source       folder, zip or tar (also .tar.gz) of PNG, WebP and JPEG images, in sub-folders or not
  destination  the zip to write: PNG files and dataset.json
  resolution   side of the written images in pixels (256); make ONE zip at the highest resolution you train,
               lower stages average its blocks while loading
  crop         center: cut the middle square out (default) | none: refuse images that are not square
  classes      folders: an image's class is its first folder (default) | keep: the source's dataset.json | none
  skip_bad     false: stop at the first unusable image (default) | true: leave such images out and name them;
               folders of which nothing is left are no classes; files of other types are counted in one line
"""


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
    """What a conversion wrote: image count, class names (None without classes), why images were left out.

    ignored: names of the files that are of other types, by their endings.
    """

    images: int
    class_names: list[str] | None
    left_out: list[str]
    ignored: list[str]


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
    with (
        progress("converting", len(source.names)) as advance,
        ImageZipWriter(destination, labels.class_names if labels else None) as writer,
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
        if options.classes is Classes.folders:
            writer.drop_empty_classes()
    return Converted(len(writer.labels), writer.class_names, left_out, source.ignored())


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


def _by_type(names: list[str]) -> str:
    """How many files of which endings, the most frequent ones named."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in names)
    shown = sorted(ending for ending, _ in endings.most_common(MAX_ENDINGS))
    more = ", ..." if len(endings) > len(shown) else ""
    return f"{len(names):,} file{'s' * (len(names) > 1)} of other types ({', '.join(shown)}{more})"


def _convert_and_report(options: ConvertOptions) -> None:
    result = convert(options)
    for line in result.left_out:
        print(f"left out: {line}", file=sys.stderr)
    if result.ignored:
        print(f"ignored: {_by_type(result.ignored)}", file=sys.stderr)
    classes = f"{len(result.class_names)} classes" if result.class_names else "no classes"
    print(
        f"{options.destination}: {result.images:,} images of {options.resolution}x{options.resolution}, {classes}, "
        f"{len(result.left_out):,} left out"
    )


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], USAGE, ConvertOptions, _convert_and_report))
