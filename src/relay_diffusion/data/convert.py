"""Conversion of a folder, zip or tar to an image zip.

Command: relay_diffusion.cli.convert_images. One zip at the highest resolution serves every stage: a relay stage ends
its forward process at block *means*, so lower stages box-average this zip while loading it (`resolution`). A second
zip made with another filter would not match.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from omegaconf import MISSING
from PIL import Image

from relay_diffusion.data.class_folders import ClassFolders, find_class_folders
from relay_diffusion.data.decode import FULL_DEPTH, box_average, decode
from relay_diffusion.data.labels import Labels, read_labels
from relay_diffusion.data.sources import LABEL_FILE, Source, open_source
from relay_diffusion.data.zip_writer import encode_png, image_zip, png_names
from relay_diffusion.errors import UserError, prefix_errors
from relay_diffusion.utils.files import refuse_existing
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.progress import progress

Crop = Enum("Crop", ["center", "none"])  # how an image becomes square
Classes = Enum("Classes", ["folders", "keep", "none"])  # where class labels come from
Exif = Enum("Exif", ["apply", "ignore"])  # whether the EXIF orientation is applied


@dataclass
class ConvertOptions:
    """Options of the command relay_diffusion.cli.convert_images."""

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
    """Result of a conversion.

    Image count, class names (None without classes), errors of the images left out.
    ignored: names of the files with other suffixes. labels: class index (None without classes) by written name.
    folders: the detected class folders, if any. turned, exif_damaged: images with an applied EXIF orientation, and
    images with a damaged EXIF block. deep_images, bits: number of 16-bit images, and the bits that their brightest
    sample needs.
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
    """Encoded image and the properties that `decode` returned."""

    png: bytes
    turned: bool
    exif_damaged: bool
    bits: int


def fit(image: Image.Image, resolution: int, crop: Crop, where: str) -> Image.Image:
    """Crop an image to a square and shrink it to `resolution`.

    Block means for an integer factor, Lanczos otherwise.
    Raises UserError with the image and its size if it is not square (crop=none) or too small.
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
    """Write the image zip that `options` describe.

    Raises UserError; the destination is unchanged then.
    """
    if options.resolution < 1:
        raise UserError(f"resolution={options.resolution}: must be at least 1")
    if not 8 <= options.bit_depth <= FULL_DEPTH:
        raise UserError(f"bit_depth={options.bit_depth}: must be 8 to {FULL_DEPTH}")
    source = open_source(options.source, "source", tar=True)
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
        image_zip(destination, labels.class_names if labels else None) as writer,
    ):
        for name, result in map_in_order(encode, source.items()):
            if isinstance(result, _Encoded):
                writer.add_encoded(targets[short_names[name]], result.png, labels.by_name[name] if labels else None)
                facts.update(turned=result.turned, exif_damaged=result.exif_damaged, deep=result.bits > 0)
                bits = max(bits, result.bits)
            elif options.skip_bad:
                left_out.append(str(result))
            else:
                raise UserError(f"source: {result}; skip_bad=true skips such images") from result
            advance()
        if not writer.labels:
            raise UserError(f"source={options.source}: none of {len(left_out)} images is usable; {left_out[0]}")
        if options.bit_depth < FULL_DEPTH and not facts["deep"]:
            raise UserError(f"bit_depth={options.bit_depth}: no image has 16 bits a sample; remove the option")
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
            raise UserError(f"class_level={level}: is for classes=folders, not classes={options.classes.name}")
        return None
    if level is not None and level < 1:
        raise UserError(f"class_level={level}: must be at least 1, the outermost folder")
    if read_labels(source) is not None:
        raise UserError(
            f"classes=folders: {source.path} has labels in {LABEL_FILE}; "
            f"classes=keep takes them, classes=none drops them"
        )
    with prefix_errors("classes=folders"):
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
