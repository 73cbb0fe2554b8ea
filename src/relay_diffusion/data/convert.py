"""Make an image zip from a folder, zip or tar: `python -m relay_diffusion.data.convert source=... destination=...`.

One zip at the highest resolution serves every stage: a relay stage ends its forward process at block *means*, so the
lower stages box-average this zip while they load it (`resolution`). A second zip made with another filter
would not match.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from omegaconf import MISSING
from PIL import Image

from relay_diffusion.checks import naming
from relay_diffusion.data.arguments import refuse_existing, run_tool
from relay_diffusion.data.class_folders import ClassFolders, find_class_folders
from relay_diffusion.data.decode import FULL_DEPTH, UNUSED_BITS, box_average, decode
from relay_diffusion.data.sources import (
    LABEL_FILE,
    Labels,
    Source,
    map_in_order,
    open_source,
    read_labels,
)
from relay_diffusion.data.zip_writer import ImageZipWriter, encode_png, png_names
from relay_diffusion.differences import printable
from relay_diffusion.errors import UserError
from relay_diffusion.progress import progress

MAX_ENDINGS = 8  # named in the line about files of other types
MAX_CLASSES_SHOWN = 20
MAX_NAMES_SHOWN = 5  # of classes, in a warning
MAX_NAME_LENGTH = 60  # shown of a class name
USAGE = """\
python -m relay_diffusion.data.convert source=FOLDER|ZIP|TAR destination=OUT.zip [key=value ...]

  source       folder, zip or tar (also .tar.gz) of PNG, WebP and JPEG images, in sub-folders or not
  destination  the zip to write: PNG files and dataset.json
  resolution   side of the written images in pixels (256); make ONE zip at the highest resolution you train,
               lower stages average its blocks while loading
  crop         center: cut the middle square out (default) | none: refuse images that are not square
  classes      folders: an image's class is its folder (default) | keep: the source's dataset.json | none
  class_level  which folder is the class, 1 being the outermost of the source; by default the first one below folders
               that hold everything (left out of the written names) and below splits (train, val, valid, test, heldout
               and the like, which stay in the names: data.dataset.subset=train); all splits have the same classes
  exif         apply: turn images as their EXIF orientation says (default) | ignore: take the pixels as stored
  bit_depth    bits that the samples of 16-bit images use, 8 to 16 (16); 12 is usual for cameras and microscopes
  skip_bad     false: stop at the first unusable image (default) | true: leave such images out and name them;
               folders of which nothing is left are no classes; files of other types are counted in one line
  overwrite    false: refuse a destination that exists (default) | true: replace it once all is converted
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


class Exif(Enum):
    """What is done about the EXIF orientation."""

    apply = "apply"
    ignore = "ignore"


@dataclass
class ConvertOptions:
    """The command line of this tool; see USAGE."""

    source: str = MISSING
    destination: str = MISSING
    resolution: int = 256
    crop: Crop = Crop.center
    classes: Classes = Classes.folders
    skip_bad: bool = False
    class_level: int | None = None
    exif: Exif = Exif.apply
    bit_depth: int = FULL_DEPTH
    overwrite: bool = False


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: image count, class names (None without classes), why images were left out.

    ignored: names of the files that are of other types, by their endings. labels: class index (None without classes) by
    written name. folders: how folders became classes, if they did. turned, exif_damaged: images whose pixels follow
    their EXIF orientation, and whose EXIF block cannot be read. deep_images, bits: 16-bit images, and the bits that
    their brightest sample needs.
    """

    images: int
    class_names: list[str] | None
    left_out: list[str]
    ignored: list[str]
    labels: dict[str, int | None]
    folders: ClassFolders | None
    turned: int
    exif_damaged: int
    deep_images: int
    bits: int


class _Encoded(NamedTuple):
    """A finished image, and what `decode` says of it."""

    png: bytes
    turned: bool
    exif_damaged: bool
    bits: int


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
    """Write the image zip that `options` describe. Errors: UserError; the destination is as before then."""
    if options.resolution < 1:
        raise UserError(f"resolution={options.resolution}: must be at least 1")
    if not 8 <= options.bit_depth <= FULL_DEPTH:
        raise UserError(f"bit_depth={options.bit_depth}: must be 8 to {FULL_DEPTH}")
    source = open_source(options.source, option="source")
    destination = Path(options.destination).expanduser()
    if destination.exists() and destination.samefile(source.path):
        raise UserError(f"destination={options.destination}: is the source itself; choose another name")
    refuse_existing(destination, "destination", options.overwrite)
    folders = _class_folders(source, options)
    labels = _labels(source, options.classes, folders)
    short_names = folders.short_names if folders else {name: name for name in source.names}
    targets = png_names(list(short_names.values()))

    def encode(item: tuple[str, Callable[[], bytes]]) -> tuple[str, _Encoded | UserError]:
        name, read = item
        where = source.where(name)
        try:
            decoded = decode(read(), where, options.exif is Exif.apply, options.bit_depth)
            png = encode_png(fit(decoded.image, options.resolution, options.crop, where))
            return name, _Encoded(png, decoded.turned, decoded.exif_damaged, decoded.bits)
        except UserError as error:
            return name, error

    left_out: list[str] = []
    facts: Counter[str] = Counter()
    bits = 0
    with (
        progress("converting", len(source.names)) as advance,
        ImageZipWriter(destination, labels.class_names if labels else None) as writer,
    ):
        for name, result in map_in_order(encode, source.items()):
            if isinstance(result, _Encoded):
                writer.add_encoded(targets[short_names[name]], result.png, labels.by_name[name] if labels else None)
                facts.update(turned=result.turned, exif_damaged=result.exif_damaged, deep=result.bits > 0)
                bits = max(bits, result.bits)
            elif options.skip_bad:
                left_out.append(str(result))
            else:
                raise UserError(f"source: {result} (skip_bad=true leaves such images out)") from result
            advance()
        if not writer.labels:
            raise UserError(f"source={options.source}: none of {len(left_out)} images is usable; {left_out[0]}")
        if options.bit_depth < FULL_DEPTH and not facts["deep"]:
            raise UserError(f"bit_depth={options.bit_depth}: no image has 16 bits a sample; leave it out")
        if options.classes is Classes.folders:
            writer.drop_empty_classes()
    return Converted(
        images=len(writer.labels),
        class_names=writer.class_names,
        left_out=left_out,
        ignored=source.ignored(),
        labels=writer.labels,
        folders=folders,
        turned=facts["turned"],
        exif_damaged=facts["exif_damaged"],
        deep_images=facts["deep"],
        bits=bits,
    )


def _class_folders(source: Source, options: ConvertOptions) -> ClassFolders | None:
    level = options.class_level
    if options.classes is not Classes.folders:
        if level is not None:
            raise UserError(f"class_level={level}: is for classes=folders, not classes={options.classes.value}")
        return None
    if level is not None and level < 1:
        raise UserError(f"class_level={level}: must be at least 1, the outermost folder")
    if read_labels(source) is not None:
        raise UserError(
            f"classes=folders: {source.path} has labels of its own in {LABEL_FILE}; "
            f"classes=keep takes them, classes=none drops them"
        )
    with naming("classes=folders"):
        return find_class_folders(source.names, level, source.where)


def _labels(source: Source, classes: Classes, folders: ClassFolders | None) -> Labels | None:
    if classes is Classes.none:
        return None
    if folders is not None:
        index = {name: position for position, name in enumerate(folders.class_names)}
        return Labels({name: index[class_name] for name, class_name in folders.class_of.items()}, folders.class_names)
    kept = read_labels(source)
    if kept is None:
        raise UserError(f"classes=keep: {source.path} has no labels in {LABEL_FILE}")
    return kept


def _by_type(names: list[str]) -> str:
    """How many files of which endings, the most frequent ones named."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in names)
    shown = sorted(ending for ending, _ in endings.most_common(MAX_ENDINGS))
    more = ", ..." if len(endings) > len(shown) else ""
    return f"{len(names):,} file{'s' * (len(names) > 1)} of other types ({', '.join(shown)}{more})"


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _shown(name: str) -> str:
    """A class name for the screen: one short line without control characters."""
    text = printable(name)
    return text if len(text) <= MAX_NAME_LENGTH else f"{text[: MAX_NAME_LENGTH - 3]}..."


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(map(_shown, names[:MAX_NAMES_SHOWN])) + more


def class_table(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Lines of class names and image counts; of many classes the first ones, and the range of the others."""
    shown = len(names) if len(names) <= MAX_CLASSES_SHOWN + 1 else MAX_CLASSES_SHOWN
    width = max((len(_shown(name)) for name in names[:shown]), default=0)
    lines = [f"  {_shown(name):{width}} {count:8,}" for name, count in zip(names[:shown], counts[:shown], strict=True)]
    if rest := counts[shown:]:
        lines.append(f"  ... and {len(rest):,} more, {min(rest):,} to {max(rest):,} images each")
    return lines


def _describe_classes(result: Converted) -> list[str]:
    """How folders became classes, the splits, and the classes with their counts."""
    lines, folders, names = [], result.folders, result.class_names or []
    if folders is not None:
        lines.append(f"classes: the folders of level {folders.level} (class_level)")
        if folders.wrappers:
            lines.append(f"left out of the names: {', '.join(f'{_shown(name)}/' for name in folders.wrappers)}")
        if folders.splits:
            sizes = Counter(name.partition("/")[0] for name in result.labels)
            splits = ", ".join(f"{_shown(split)} ({_counted(sizes[split], 'image')})" for split in folders.splits)
            lines.append(f"splits (data.dataset.subset): {splits}")
    counts = Counter(result.labels.values())
    return lines + class_table(names, [counts[label] for label in range(len(names))])


def _warnings(result: Converted, options: ConvertOptions) -> list[str]:
    """What was done in silence, or looks wrong."""
    lines, folders, names = [], result.folders, result.class_names or []
    if folders is not None:
        nested = sorted(set(folders.nested) & set(names))
        if nested:
            lines.append(
                f"warning: {len(nested):,} of {len(names):,} class folders hold folders, but no image "
                f"({_some(nested)}): class_level={folders.level + 1} takes the folders in them as classes"
            )
        for split in folders.splits:
            there = {label for name, label in result.labels.items() if name.startswith(f"{split}/")}
            missing = [name for label, name in enumerate(names) if label not in there]
            if missing:
                lines.append(
                    f"warning: {_shown(split)} has no image of {len(missing):,} of {len(names):,} classes: "
                    f"{_some(missing)}"
                )
        if len(names) == 1:
            lines.append(f"warning: {_shown(names[0])} is the only class: classes=none if it is none, or class_level=N")
    if result.exif_damaged:
        images = _counted(result.exif_damaged, "image")
        lines.append(f"warning: {images} with a damaged EXIF block: the pixels are taken as stored")
    if result.deep_images and result.bits <= options.bit_depth - UNUSED_BITS:
        lines.append(
            f"warning: {_counted(result.deep_images, '16-bit image')} with values below {2**result.bits:,} of "
            f"{2**options.bit_depth:,}, which become dark: bit_depth={result.bits} rescales them"
        )
    return lines


def _convert_and_report(options: ConvertOptions) -> None:
    result = convert(options)
    for line in result.left_out:
        print(f"left out: {line}", file=sys.stderr)
    if result.ignored:
        print(f"ignored: {_by_type(result.ignored)}", file=sys.stderr)
    for line in _warnings(result, options):
        print(line, file=sys.stderr)
    if result.turned:
        print(f"EXIF orientation applied to {_counted(result.turned, 'image')}")
    for line in _describe_classes(result):
        print(line)
    classes = f"{len(result.class_names)} classes" if result.class_names else "no classes"
    print(
        f"{options.destination}: {result.images:,} images of {options.resolution}x{options.resolution}, {classes}, "
        f"{len(result.left_out):,} left out"
    )


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], USAGE, ConvertOptions, _convert_and_report))
