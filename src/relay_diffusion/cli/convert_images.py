"""Convert a folder, zip or tar of images to an image zip."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.convert import Converted, ConvertOptions, convert, usable_images, written_size
from relay_diffusion.data.decode import UNUSED_BITS, dark_warning
from relay_diffusion.data.sources import describe_files
from relay_diffusion.utils.messages import first_names, override, shorten
from relay_diffusion.utils.resolution import resolution_of, size_text

MAX_CLASSES_SHOWN = 20
RESOLUTIONS = (32, 64, 128, 256, 512, 1024)  # whose numbers of usable images are printed
FIRST_STAGE, FIRST_SIDE = "own_64", 64  # preset of the printed training command, and its resolution
USAGE = """\
python -m relay_diffusion.cli.convert_images source=FOLDER|ZIP|TAR destination=OUT.zip [key=value ...]

  source       folder, zip or tar (also .tar.gz) of PNG, WebP and JPEG images, in sub-folders or not
  destination  the zip to write: PNG files and dataset.json
  resolution   size of the written images in pixels (256), or [height,width]; make ONE zip at the highest resolution
               you train: earlier stages average blocks of its pixels while loading
  fit          crop: the largest central part of that shape (default) | pad: the whole image, with margins |
               stretch: the whole image, distorted | none: require images of that shape
  upscale      false: refuse images smaller than the resolution (default) | true: enlarge them (from 8 pixels)
  background   color behind transparent pixels and of margins: a name or #rrggbb (white)
  channels     1: grayscale | 3: RGB (default) | 4: RGBA, which keeps transparency
  classes      folders: an image's class is its folder (default) | keep: the source's dataset.json | none
  class_level  level of the class folders (1: outermost). Default: the first one below split folders (train, val, valid,
               test, heldout; kept in the written names, for data.dataset.subset=train) and below a single folder
               around all images (left out of the names). All splits have the same classes
  captions     keep: those in the source's dataset.json, if any (default) | txt: a file a.txt next to a.png, one
               caption per line | json: captions_file | metadata: captions_file, or every metadata.csv and
               metadata.jsonl of the source, with the column file_name (as Hugging Face's imagefolder) | none
  captions_file   {"a.png": caption or [caption, ...]} for captions=json; a .csv or .jsonl for captions=metadata
  captions_column  column of the captions for captions=metadata (text)
  exif         apply: rotate images by their EXIF orientation (default) | ignore: keep the pixels as stored
  bit_depth    bits that the samples of 16-bit images use, 8 to 16 (16); 12 is usual for cameras and microscopes
  skip_bad     false: stop at the first unusable image (default) | true: leave out such images and print the reasons;
               folders without usable images do not become classes; files of other types are counted in one line
  overwrite    false: refuse a destination that exists (default) | true: replace it after the conversion
"""


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def class_table(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Return one line per class with its image count, shortened if many."""
    shown = len(names) if len(names) <= MAX_CLASSES_SHOWN + 1 else MAX_CLASSES_SHOWN
    width = max((len(shorten(name)) for name in names[:shown]), default=0)
    lines = [f"  {shorten(name):{width}} {count:8,}" for name, count in zip(names[:shown], counts[:shown], strict=True)]
    if rest := counts[shown:]:
        lines.append(f"  ... and {len(rest):,} more, {min(rest):,} to {max(rest):,} images each")
    return lines


def _describe_classes(result: Converted) -> list[str]:
    """Describe class folders, splits and classes, one line each."""
    lines, folders, names = [], result.folders, result.class_names or []
    if folders is not None:
        lines.append(f"classes: the folders of level {folders.level} (class_level)")
        if folders.wrappers:
            lines.append(f"left out of the names: {', '.join(f'{shorten(name)}/' for name in folders.wrappers)}")
        if folders.splits:
            sizes = Counter(name.partition("/")[0] for name in result.labels)
            splits = ", ".join(f"{shorten(split)} ({_counted(sizes[split], 'image')})" for split in folders.splits)
            lines.append(f"splits (data.dataset.subset): {splits}")
    counts = Counter(result.labels.values())
    return lines + class_table(names, [counts[label] for label in range(len(names))])


def _warnings(result: Converted, options: ConvertOptions) -> list[str]:
    """Return warnings about class folders, EXIF blocks and 16-bit images."""
    lines, folders, names = [], result.folders, result.class_names or []
    if folders is not None:
        nested = sorted(set(folders.nested) & set(names))
        if nested:
            lines.append(
                f"warning: {len(nested):,} of {len(names):,} class folders hold folders, but no image "
                f"({first_names(nested)}): class_level={folders.level + 1} takes the folders in them as classes"
            )
        for split in folders.splits:
            present = {label for name, label in result.labels.items() if name.startswith(f"{split}/")}
            missing = [name for label, name in enumerate(names) if label not in present]
            if missing:
                lines.append(
                    f"warning: {shorten(split)} has no image of {len(missing):,} of {len(names):,} classes: "
                    f"{first_names(missing)}"
                )
        if len(names) == 1:
            lines.append(f"warning: {shorten(names[0])} is the only class; use classes=none, or class_level=N")
    if result.exif_damaged:
        images = _counted(result.exif_damaged, "image")
        lines.append(f"warning: {images} with a damaged EXIF block; the pixels are kept as stored")
    if result.deep_images and result.bits <= options.bit_depth - UNUSED_BITS:
        lines.append(dark_warning(_counted(result.deep_images, "16-bit image"), result.bits, options.bit_depth))
    return lines


def _describe_left_out(result: Converted) -> list[str]:
    """Summarize the images left out: one line, and one for each reason."""
    if not result.left_out:
        return []
    lines = [f"left out: {len(result.left_out):,} of {result.images + len(result.left_out):,} images"]
    reasons = Counter(image.reason for image in result.left_out)
    for reason, count in reasons.most_common():
        names = [image.name for image in result.left_out if image.reason == reason]
        lines.append(f"  {count:,} {reason} ({first_names(names)})")
    return lines


def _describe_captions(result: Converted) -> list[str]:
    """Describe found, missing and unused captions; nothing without captions."""
    if not (result.captions or result.unused_captions):
        return []
    lines = [f"captions: {len(result.captions):,} of {_counted(result.images, 'image')}"]
    if missing := [name for name in result.labels if name not in result.captions]:
        lines.append(f"  {len(missing):,} without ({first_names(missing)})")
    if result.unused_captions:
        lines.append(f"  {len(result.unused_captions):,} unused ({first_names(result.unused_captions)})")
    return lines


def _describe_resolutions(result: Converted, options: ConvertOptions) -> str:
    """Describe how many images each resolution would keep without enlarging."""
    own = written_size(options.resolution)
    wanted = sorted({own, *((side, side) for side in RESOLUTIONS)})
    kept = {size: usable_images(result.sizes, size, options.fit) for size in wanted}
    shown = [f"{resolution_of(size)}: {count:,}" for size, count in kept.items() if count or size == own]
    return f"images that each resolution keeps without enlarging: {', '.join(shown)}"


def training_command(result: Converted, options: ConvertOptions) -> str | None:
    """Return the command that trains a first stage on the zip.

    None if the preset cannot read it: images that are not square, or whose side is no multiple of FIRST_SIDE.
    """
    height, width = written_size(options.resolution)
    if height != width or height % FIRST_SIDE:
        return None
    splits = result.folders.splits if result.folders else []
    words = {
        "experiment": FIRST_STAGE,
        "data.dataset.path": options.destination,
        "data.dataset.subset": next((split for split in splits if split.lower() in ("train", "training")), ""),
        "data.dataset.channels": "" if options.channels == 3 else str(options.channels),
        "text": "minilm" if result.captions else "",
        "run_dir": "outputs/mine/base",
    }
    return " ".join(["python train.py", *(override(key, value) for key, value in words.items() if value)])


def report_conversion(options: ConvertOptions) -> None:
    """Convert the images and print what was done."""
    result = convert(options)
    for line in _describe_left_out(result):
        print(line, file=sys.stderr)
    if result.ignored:
        print(f"ignored: {describe_files(result.ignored)}", file=sys.stderr)
    for line in _warnings(result, options):
        print(line, file=sys.stderr)
    if result.turned:
        print(f"EXIF orientation applied to {_counted(result.turned, 'image')}")
    if result.enlarged:
        print(f"enlarged {_counted(result.enlarged, 'image')} (upscale=true)")
    print(_describe_resolutions(result, options))
    for line in _describe_classes(result) + _describe_captions(result):
        print(line)
    count = len(result.class_names or ())
    classes = "1 class" if count == 1 else f"{count or 'no'} classes"
    print(
        f"{options.destination}: {result.images:,} images of {size_text(written_size(options.resolution))}, {classes}, "
        f"{len(result.left_out):,} left out"
    )
    if command := training_command(result, options):
        print(f"train: {command}")


def main() -> NoReturn:
    """Run the command."""
    sys.exit(run_tool(sys.argv[1:], USAGE, ConvertOptions, report_conversion))


if __name__ == "__main__":
    main()
