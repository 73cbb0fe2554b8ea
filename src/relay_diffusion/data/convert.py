"""Conversion of a folder, zip or tar to an image zip.

Command: relay_diffusion.cli.convert_images. One zip at the highest resolution serves every stage: a relay stage ends
its forward process at block *means*, so lower stages box-average this zip while loading it (`resolution`). A second
zip made with another filter would not match.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import MISSING
from PIL import Image, ImageColor

from relay_diffusion.data.caption_files import TEXT_COLUMN, FoundCaptions, json_file, metadata_tables, text_files
from relay_diffusion.data.captions import read_captions
from relay_diffusion.data.class_folders import ClassFolders, find_class_folders
from relay_diffusion.data.decode import FULL_DEPTH, MODES, WHITE, UnusableImageError, box_average, decode
from relay_diffusion.data.labels import Labels, read_labels
from relay_diffusion.data.sources import LABEL_FILE, Source, open_source
from relay_diffusion.data.zip_writer import encode_png, image_zip, png_names
from relay_diffusion.errors import UserError, prefix_errors
from relay_diffusion.utils.files import refuse_existing
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.progress import progress
from relay_diffusion.utils.resolution import MIN_SIDE, Resolution, Size, image_size, resolution_of

Fit = Enum("Fit", ["crop", "pad", "stretch", "none"])  # how an image gets the written shape
Classes = Enum("Classes", ["folders", "keep", "none"])  # where class labels come from
Captions = Enum("Captions", ["keep", "txt", "json", "metadata", "none"])  # where captions come from
Exif = Enum("Exif", ["apply", "ignore"])  # whether the EXIF orientation is applied


@dataclass
class ConvertOptions:
    """Options of the command relay_diffusion.cli.convert_images."""

    source: str = MISSING
    destination: str = MISSING
    resolution: Any = 256  # a number of pixels or [height, width], or its text
    fit: Fit = Fit.crop
    classes: Classes = Classes.folders
    skip_bad: bool = False
    class_level: int | None = None
    exif: Exif = Exif.apply
    bit_depth: int = FULL_DEPTH
    overwrite: bool = False
    upscale: bool = False
    background: str = "white"
    channels: int = 3
    captions: Captions = Captions.keep
    captions_file: str | None = None
    captions_column: str | None = None


class LeftOut(NamedTuple):
    """Image that was left out: its name, the reason it shares with others, and its own error."""

    name: str
    reason: str
    error: str


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    Image count, class names (None without classes), images left out, number of enlarged images.
    ignored: names of the files with other suffixes. labels: class index (None without classes) by written name.
    folders: the detected class folders, if any. turned, exif_damaged: images with an applied EXIF orientation, and
    images with a damaged EXIF block. deep_images, bits: number of 16-bit images, and the bits that their brightest
    sample needs. sizes: number of decoded images by (height, width). captions: those of the images that have some, by
    written name. unused_captions: names of caption files and entries without an image.
    """

    images: int
    class_names: list[str] | None
    left_out: list[LeftOut]
    ignored: list[str]
    labels: dict[str, int | None]
    folders: ClassFolders | None
    turned: int
    exif_damaged: int
    deep_images: int
    bits: int
    enlarged: int
    sizes: Mapping[Size, int]
    captions: Mapping[str, list[str]]
    unused_captions: list[str]


class _Encoded(NamedTuple):
    """Result for one image: a PNG or an error, and the properties that `decode` returned."""

    png: bytes | None
    error: UserError | None = None
    size: Size | None = None
    turned: bool = False
    exif_damaged: bool = False
    bits: int = 0


def fit_problem(stored: Size, size: Size, fit: Fit, upscale: bool = False) -> str | None:
    """Return why an image cannot be fitted to `size`.

    None if it can. stored: its own (height, width).
    """
    enough = [had >= wanted for had, wanted in zip(stored, size, strict=True)]
    if fit is Fit.none and stored[0] * size[1] != stored[1] * size[0]:
        shape = "square" if size[0] == size[1] else f"of the shape {size[1]}x{size[0]}"
        return f"not {shape}; use fit=crop, pad or stretch"
    if not upscale and not (any(enough) if fit is Fit.pad else all(enough)):
        return f"smaller than resolution={resolution_of(size)}; upscale=true enlarges such images"
    return f"smaller than {MIN_SIDE} pixels" if min(stored) < MIN_SIDE else None


def usable_images(sizes: Mapping[Size, int], size: Size, fit: Fit) -> int:
    """Count the images that can be fitted to `size` without enlarging; sizes: as in Converted."""
    return sum(count for stored, count in sizes.items() if fit_problem(stored, size, fit) is None)


def fitted(
    image: Image.Image,
    size: Size,
    fit: Fit,
    where: str,
    upscale: bool = False,
    background: tuple[int, int, int] = WHITE,
) -> Image.Image:
    """Return an image of `size` (height, width), with the channels of `image`.

    crop: the largest part of that shape, from the middle. pad: the whole image, in the middle of `background` (RGB),
    which is transparent if the image has an alpha channel.
    stretch: the whole image, with its sides scaled independently. none: the image must have the shape.
    Block means for an integer factor, Lanczos otherwise. where: names the image in messages.
    Raises UnusableImageError for another shape (none), and for an image that would be enlarged, unless `upscale`.
    """
    stored, (height, width) = (image.height, image.width), size
    if problem := fit_problem(stored, size, fit, upscale):
        raise UnusableImageError(f"{where} is {image.width}x{image.height}, {problem}", problem)
    if fit is Fit.crop:
        part_height = min(stored[0], max(1, round(stored[1] * height / width)))
        part_width = min(stored[1], max(1, round(stored[0] * width / height)))
        top, left = (stored[0] - part_height) // 2, (stored[1] - part_width) // 2
        image = image.crop((left, top, left + part_width, top + part_height))
    if fit is not Fit.pad:
        return _scaled(image, size)
    inner_height = min(height, max(1, round(stored[0] * width / stored[1])))
    inner_width = min(width, max(1, round(stored[1] * height / stored[0])))
    canvas = Image.new("RGB", (width, height), background).convert(image.mode)
    if image.mode == "RGBA":
        canvas.putalpha(0)
    canvas.paste(
        _scaled(image, (inner_height, inner_width)), ((width - inner_width) // 2, (height - inner_height) // 2)
    )
    return canvas


def _scaled(image: Image.Image, size: Size) -> Image.Image:
    height, width = size
    factor = image.height // height
    if factor and image.size == (width * factor, height * factor):
        return box_average(image, factor)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def written_size(resolution: Resolution | str) -> Size:
    """Return the (height, width) of the written images.

    resolution: R or [height, width], or its text. Raises UserError.
    """
    try:
        return image_size(json.loads(resolution) if isinstance(resolution, str) else resolution, least=MIN_SIDE)
    except json.JSONDecodeError:
        raise UserError(f"resolution={resolution}: must be a whole number, or [height, width]") from None
    except ValueError as error:
        raise UserError(str(error)) from None


def convert(options: ConvertOptions) -> Converted:
    """Write the image zip that `options` describe.

    Raises UserError; the destination is unchanged then.
    """
    size = written_size(options.resolution)
    if options.channels not in MODES:
        raise UserError(f"channels={options.channels}: must be 1 (grayscale), 3 (RGB) or 4 (RGBA)")
    if not 8 <= options.bit_depth <= FULL_DEPTH:
        raise UserError(f"bit_depth={options.bit_depth}: must be 8 to {FULL_DEPTH}")
    background = _color(options.background)
    source = open_source(options.source, "source", tar=True)
    destination = Path(options.destination).expanduser()
    if destination.exists() and destination.samefile(source.path):
        raise UserError(f"destination={options.destination}: is the source itself; choose another name")
    refuse_existing(destination, "destination", options.overwrite)
    folders = _class_folders(source, options)
    labels = _labels(source, options.classes, folders)
    captions = _captions(source, options)
    short_names = folders.short_names if folders else {name: name for name in source.names}
    targets = png_names(list(short_names.values()))

    def encode(item: tuple[str, Callable[[], bytes]]) -> tuple[str, _Encoded]:
        name, read = item
        where = source.where(name)
        try:
            decoded = decode(read(), where, options.exif is Exif.apply, options.bit_depth, background, options.channels)
        except UserError as error:
            return name, _Encoded(None, error)
        stored = (decoded.image.height, decoded.image.width)
        try:
            png = encode_png(fitted(decoded.image, size, options.fit, where, options.upscale, background))
        except UserError as error:
            return name, _Encoded(None, error, stored)
        return name, _Encoded(png, None, stored, decoded.turned, decoded.exif_damaged, decoded.bits)

    left_out: list[LeftOut] = []
    facts: Counter[str] = Counter()
    sizes: Counter[Size] = Counter()
    bits = 0
    with (
        progress("converting", len(source.names)) as advance,
        image_zip(destination, labels.class_names if labels else None) as writer,
    ):
        for name, result in map_in_order(encode, source.items()):
            if result.size is not None:
                sizes[result.size] += 1
            if result.png is not None:
                label = labels.by_name[name] if labels else None
                some = captions.by_name.get(name, ())
                writer.add_encoded(targets[short_names[name]], result.png, label, some)
                facts.update(turned=result.turned, exif_damaged=result.exif_damaged, deep=result.bits > 0)
                facts.update(enlarged=fit_problem(cast(Size, result.size), size, options.fit) is not None)
                bits = max(bits, result.bits)
            elif options.skip_bad:
                reason = result.error.reason if isinstance(result.error, UnusableImageError) else "unreadable"
                left_out.append(LeftOut(name, reason, str(result.error)))
            else:
                raise UserError(f"source: {result.error}; skip_bad=true leaves such images out") from result.error
            advance()
        if not writer.labels:
            raise UserError(f"source={options.source}: none of {len(left_out)} images is usable; {left_out[0].error}")
        if options.bit_depth < FULL_DEPTH and not facts["deep"]:
            raise UserError(f"bit_depth={options.bit_depth}: no image has 16 bits a sample; remove the option")
        if options.classes is Classes.folders:
            writer.drop_empty_classes()
    return Converted(
        images=len(writer.labels),
        class_names=writer.class_names,
        left_out=left_out,
        ignored=[name for name in source.ignored() if name not in captions.files],
        labels=writer.labels,
        folders=folders,
        turned=facts["turned"],
        exif_damaged=facts["exif_damaged"],
        deep_images=facts["deep"],
        bits=bits,
        enlarged=facts["enlarged"],
        sizes=sizes,
        captions=writer.captions,
        unused_captions=captions.unused,
    )


def _color(text: str) -> tuple[int, int, int]:
    try:
        red, green, blue = cast(tuple[int, int, int], ImageColor.getcolor(text, "RGB"))
    except ValueError:
        raise UserError(f"background={text}: use a color name such as gray, or #rrggbb") from None
    return red, green, blue


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


def _captions(source: Source, options: ConvertOptions) -> FoundCaptions:
    chosen, path, column = options.captions, options.captions_file, options.captions_column
    if path is not None and chosen not in (Captions.json, Captions.metadata):
        raise UserError(f"captions_file={path}: is for captions=json and captions=metadata, not {chosen.name}")
    if column is not None and chosen is not Captions.metadata:
        raise UserError(f"captions_column={column}: is for captions=metadata, not captions={chosen.name}")
    if chosen is Captions.none:
        return FoundCaptions({})
    if chosen is Captions.keep:
        return FoundCaptions(read_captions(source))
    with prefix_errors(f"captions={chosen.name}"):
        if chosen is Captions.txt:
            found = text_files(source)
        elif chosen is Captions.metadata:
            found = metadata_tables(source, column or TEXT_COLUMN, path)
        elif path is None:
            raise UserError("needs captions_file=FILE.json")
        else:
            found = json_file(source, path)
        if not any(found.by_name.values()):
            raise UserError(
                f"none of {len(source.names):,} images has a caption; correct the names, or use captions=none"
            )
    return found
