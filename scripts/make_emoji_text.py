"""Collect emoji of four styles with captions in an image zip.

Fluent Emoji 3D and Fluent Emoji flat (MIT), Noto Emoji (Apache-2.0) and Twemoji (CC-BY-4.0), from npm packages, on
white. Captions come from unicode-emoji-json and emojilib (MIT). docs/emoji-text.md describes the set.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import MISSING
from PIL import Image

from make_emoji import (
    GROUPS_MEMBER,
    LEFT_OUT_GROUP,
    SKIN_TONES,
    VARIATION_SELECTOR,
    base_emoji,
    emoji_code_points,
    read_json_member,
    slug,
    without,
)
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
python scripts/make_emoji_text.py packages=FOLDER destination=OUT.zip [key=value ...]

  packages     folder with the npm tarballs, made by
                 npm pack @lobehub/fluent-emoji-3d@1.1.0 @lobehub/fluent-emoji-flat@1.1.0 @iconify-json/noto@1.2.9 \\
                     @iconify-json/twemoji@1.2.5 unicode-emoji-json@0.9.0 emojilib@4.0.3
  destination  the zip to write: train/, composition/ and heldout/ with STYLE/*.png each, and dataset.json
  resolution   side of the written images in pixels (256; smaller: block means of images of 256 pixels)
  tones        skin tones of an emoji and style in train/; the others are in tones/ (null: all are in train/)
  classes      group: a class is a group of emoji, such as food-drink (default) | style: 3d, flat, noto or twemoji
  overwrite    false: refuse a destination that exists (default) | true: replace it once all is converted

Needs resvg-py, which renders SVG: pip install -e '.[emoji]'
"""
TARBALLS = {
    "3d": "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "flat": "lobehub-fluent-emoji-flat-1.1.0.tgz",
    "noto": "iconify-json-noto-1.2.9.tgz",
    "twemoji": "iconify-json-twemoji-1.2.5.tgz",
    "names": "unicode-emoji-json-0.9.0.tgz",
    "keywords": "emojilib-4.0.3.tgz",
}
STYLES = {"3d": "3D style", "flat": "flat style", "noto": "Noto style", "twemoji": "Twemoji style"}  # in captions
KEYWORDS_MEMBER = "package/dist/emoji-en-US.json"
RENDERED = 256  # pixels
MAX_KEYWORDS = 6  # in a caption; the first ones describe the emoji best
COMPOSITION_PERCENT = 10  # of the pairs of an emoji and a style
HELDOUT_PERCENT = 3  # of the emoji, in all styles

# Pictures that are wrong on white, found by eye.
WRONG_ON_WHITE = {("flat", "1f533"): "its frame is white"}  # without it, the button is the black medium square
JOINER, FACING_RIGHT = "200d", "27a1"
GENDER_SIGNS = {"2640", "2642"}
TONE_NAMES = dict(zip(sorted(SKIN_TONES), ("light", "medium-light", "medium", "medium-dark", "dark"), strict=True))
# Emoji whose skin tones have sequences of two persons, which the list of names does not have.
TWO_PERSONS = {
    "1faf1-200d-1faf2": "1f91d",  # handshake
    "1f468-200d-1f91d-200d-1f468": "1f46c",  # holding hands
    "1f469-200d-1f91d-200d-1f468": "1f46b",
    "1f469-200d-1f91d-200d-1f469": "1f46d",
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couple with heart
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kiss
    "1f9d1-200d-1f430-200d-1f9d1": "1f46f",  # bunny ears
    "1f468-200d-1f430-200d-1f468": "1f46f-200d-2642",
    "1f469-200d-1f430-200d-1f469": "1f46f-200d-2640",
    "1f9d1-200d-1faef-200d-1f9d1": "1f93c",  # wrestling
    "1f468-200d-1faef-200d-1f468": "1f93c-200d-2642",
    "1f469-200d-1faef-200d-1f469": "1f93c-200d-2640",
}
# Person, child, older person and others whose genders are code points of their own.
NEUTRAL = {
    "1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2", "1f474": "1f9d3", "1f475": "1f9d3",
    "1f385": "1f9d1-200d-1f384", "1f936": "1f9d1-200d-1f384", "1f934": "1fac5", "1f478": "1fac5", "1f57a": "1f483",
    "1f930": "1fac4", "1fac3": "1fac4", "1f46b": "1f46d", "1f46c": "1f46d", "1f9d1-200d-1f91d-200d-1f9d1": "1f46d",
}  # fmt: skip
FAMILY, FAMILY_MEMBERS = "1f46a", {"1f9d1", "1f9d2"}

Classes = Enum("Classes", ["group", "style"])  # what the class labels are
Svg = Callable[[str], bytes]  # renders SVG to PNG


@dataclass
class EmojiTextOptions:
    """Options of this command; see USAGE."""

    packages: str = MISSING
    destination: str = MISSING
    resolution: int = RENDERED
    tones: int | None = None
    classes: Classes = Classes.group
    overwrite: bool = False


@dataclass(frozen=True)
class Emoji:
    """Name, group and keywords of an emoji without skin tones."""

    name: str
    group: str
    keywords: list[str]


@dataclass(frozen=True)
class Picture:
    """One picture: its style, code points as in `normalized`, emoji, and function that returns encoded pixels."""

    style: str
    code_points: str
    emoji: Emoji
    read: Callable[[], bytes]


@dataclass(frozen=True)
class EmojiTextSet:
    """Counts of written and omitted pictures.

    pairs: by (style, subset). flags, unnamed: by style. unusable: error of each picture that was left out.
    """

    pairs: Mapping[tuple[str, str], int]
    flags: Mapping[str, int]
    unnamed: Mapping[str, int]
    unusable: list[str]


def normalized(code_points: str) -> str:
    """Return code points without leading zeros and presentation selectors: '0023-fe0f-20e3' -> '23-20e3'."""
    return without("-".join(point.lstrip("0") for point in code_points.lower().split("-")), VARIATION_SELECTOR)


def untoned(code_points: str) -> str:
    """Return the emoji without skin tones, as the list of names has it."""
    base = base_emoji(code_points)
    return TWO_PERSONS.get(base, base)


def base_group(code_points: str) -> str:
    """Return the emoji that stands for all its skin tones, genders and directions.

    '1f469-1f3fd-200d-1f692' (woman firefighter: medium skin tone) -> '1f9d1-200d-1f692'. All families are one group.
    """
    points = [NEUTRAL.get(point, point) for point in untoned(code_points).split(f"-{JOINER}-")]
    points = [points[0], *(point for point in points[1:] if point not in {*GENDER_SIGNS, FACING_RIGHT})]
    if len(points) > 1 and set(points) <= FAMILY_MEMBERS:
        return FAMILY
    base = f"-{JOINER}-".join(points)
    base = TWO_PERSONS.get(base, base)
    return NEUTRAL.get(base, base)


def chosen(name: str, percent: int) -> bool:
    """Choose about `percent` of all names by their checksum."""
    return zlib.crc32(name.encode()) % 100 < percent


def subsets(groups: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return the subset of each (group, style): train, composition or heldout.

    A group is a `base_group`. heldout: the group is chosen, in all styles. composition: the pair is chosen, and the
    group is in train in another style. A pure function of the names, not of their order.
    """
    styles: dict[str, set[str]] = defaultdict(set)
    for group, style in groups:
        styles[group].add(style)
    found = {}
    for group, known in styles.items():
        apart = {style for style in known if chosen(f"{group} {style}", COMPOSITION_PERCENT)}
        for style in known:
            subset = "composition" if style in apart and apart < known else "train"
            found[group, style] = "heldout" if chosen(group, HELDOUT_PERCENT) else subset
    return found


def further_tones(pictures: Iterable[tuple[str, str]], tones: int) -> set[tuple[str, str]]:
    """Return the pictures (style, code points) with skin tones beyond the first `tones` of each emoji and style.

    Checksums order them, so that each emoji and style has other tones.
    """
    toned: dict[tuple[str, str], list[str]] = defaultdict(list)
    for style, code_points in pictures:
        if not SKIN_TONES.isdisjoint(code_points.split("-")):
            toned[style, untoned(code_points)].append(code_points)
    return {
        (style, code_points)
        for (style, _), variants in toned.items()
        for code_points in sorted(variants, key=lambda points: zlib.crc32(f"{points} {style}".encode()))[tones:]
    }


def captions_of(emoji: Emoji, code_points: str, style: str) -> list[str]:
    """Return the captions of a picture: its name, name and style, and name, keywords and style."""
    tones = dict.fromkeys(TONE_NAMES[point] for point in code_points.split("-") if point in SKIN_TONES)
    skin = [" and ".join(f"{tone} skin tone" for tone in tones)] if tones else []
    parts = [[emoji.name, *skin], [emoji.name, *skin, STYLES[style]]]
    if emoji.keywords:
        parts.append([emoji.name, *emoji.keywords[:MAX_KEYWORDS], *skin, STYLES[style]])
    return [", ".join(part) for part in parts]


def read_emoji(names: str | Path, keywords: str | Path) -> dict[str, Emoji]:
    """Read names, groups and keywords of all emoji by normalized code points.

    Raises UserError naming `packages`.
    """

    def named(content: Any) -> dict[str, tuple[str, str]]:
        return {emoji: (_plain(entry["name"]), slug(entry["group"])) for emoji, entry in content.items()}

    def words(content: Any) -> dict[str, list[str]]:
        plain = {emoji: [_plain(word).replace("_", " ") for word in found] for emoji, found in content.items()}
        return {  # the first one is the name; emoticons and numbers are no words
            emoji: [word for word in found[1:] if re.fullmatch(r"[^\W\d_][\w '-]*", word)]
            for emoji, found in plain.items()
        }

    by_name = read_json_member(names, GROUPS_MEMBER, "packages", named)
    by_keyword = read_json_member(keywords, KEYWORDS_MEMBER, "packages", words)
    return {
        normalized(emoji_code_points(emoji)): Emoji(name, group, by_keyword.get(emoji, []))
        for emoji, (name, group) in by_name.items()
    }


def _plain(text: str) -> str:
    """Return text with typewriter quotes."""
    return text.translate({0x2019: "'", 0x201C: None, 0x201D: None})


def webp_pictures(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield (code points, function that reads the file) of the images in a tarball."""
    for name, read in open_source(path, "packages", tar=True).items():
        yield PurePosixPath(name).stem, read


def svg_pictures(path: Path, render: Svg) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield (code points, function that renders) of the SVG files in a tarball.

    Raises UserError naming `packages` for a damaged tarball.
    """
    try:
        with tarfile.open(path, tarinfo=BoundedTarInfo) as archive:
            for info in archive:
                if info.isfile() and info.name.endswith(".svg"):
                    yield PurePosixPath(info.name).stem, partial(render, tar_bytes(archive, info).decode())
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"packages: {path} is damaged; fetch it again") from error


def icon_pictures(path: Path, render: Svg) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield (code points, function that renders) of an Iconify icon set.

    Icons that are not square are centered in a square. Raises UserError naming `packages` for another tarball.
    """

    def drawings(content: Any) -> dict[str, str]:
        parents = {name: alias["parent"] for name, alias in content.get("aliases", {}).items()}
        icons = {name: _square_svg(icon, content) for name, icon in content["icons"].items()}
        return icons | {name: icons[parent] for name, parent in parents.items() if parent in icons}

    icons = read_json_member(path, "package/icons.json", "packages", drawings)
    names = read_json_member(path, "package/chars.json", "packages", lambda content: dict(content.items()))
    for code_points, name in names.items():
        if name in icons:
            yield code_points, partial(render, icons[name])


def _square_svg(icon: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    width, height = (float(icon.get(key, defaults[key])) for key in ("width", "height"))
    side = max(width, height)
    view = f"{(width - side) / 2:g} {(height - side) / 2:g} {side:g} {side:g}"
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} viewBox="{view}">{icon["body"]}</svg>'


def render_svg(svg: str) -> bytes:
    """Render SVG to a PNG of RENDERED pixels width on a transparent background.

    Raises UserError for SVG with text, images and links to other files, which need fonts and files, and for SVG that
    cannot be parsed.
    """
    import resvg_py  # a dependency of this script alone

    if found := re.search(r"<(text|image)\b|href\s*=\s*[\"'](?!#)", svg):
        raise UserError(f"contains {found[0]!r}, which needs fonts or other files")
    try:
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, skip_system_fonts=True))
    except ValueError as error:
        raise UserError(f"cannot be rendered: {error}") from error


def pixels_of(picture: Picture, resolution: int) -> Image.Image:
    """Return a picture on white.

    Raises UserError if it cannot be read, is blank, or is wrong on white.
    """
    where = f"{picture.style} {picture.code_points}"
    if reason := WRONG_ON_WHITE.get((picture.style, picture.code_points)):
        raise UserError(f"{where}: {reason}")
    try:
        image = fitted(decode_rgb(picture.read(), where), (RENDERED, RENDERED), Fit.crop, where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if all(low == high for low, high in image.getextrema()):
        raise UserError(f"{where}: is blank")
    return fitted(image, (resolution, resolution), Fit.crop, where)


def build(options: EmojiTextOptions, render: Svg = render_svg) -> EmojiTextSet:
    """Write the zip of emoji with captions.

    render: converts SVG to PNG. Pictures that cannot be rendered, and blank ones, are left out and counted. Raises
    UserError without changing the destination.
    """
    if not 1 <= options.resolution <= RENDERED:
        raise UserError(f"resolution={options.resolution}: must be 1 to {RENDERED}")
    if options.tones is not None and options.tones < 0:
        raise UserError(f"tones={options.tones}: must be at least 0, or null for all")
    refuse_existing(Path(options.destination).expanduser(), "destination", options.overwrite)
    folder = existing_path(options.packages, "packages")
    paths = {key: existing_path(folder / name, "packages") for key, name in TARBALLS.items()}
    emoji = read_emoji(paths["names"], paths["keywords"])
    pictures: dict[str, Iterable[tuple[str, Callable[[], bytes]]]] = {
        "3d": webp_pictures(paths["3d"]),
        "flat": svg_pictures(paths["flat"], render),
        "noto": icon_pictures(paths["noto"], render),
        "twemoji": icon_pictures(paths["twemoji"], render),
    }
    found: dict[tuple[str, str], Picture] = {}
    flags, unnamed = Counter[str](), Counter[str]()
    for style in STYLES:
        for name, read in pictures[style]:
            code_points = normalized(name)
            known = emoji.get(untoned(code_points))
            flags[style] += known is not None and known.group == slug(LEFT_OUT_GROUP)
            unnamed[style] += known is None
            if known is not None and known.group != slug(LEFT_OUT_GROUP):
                # the same emoji with and without a presentation selector is one picture
                found.setdefault((style, code_points), Picture(style, code_points, known, read))
    chosen_subsets = subsets((base_group(points), style) for style, points in found)
    further = set() if options.tones is None else further_tones(found, options.tones)
    class_of = {Classes.group: lambda p: p.emoji.group, Classes.style: lambda p: p.style}[options.classes]
    class_names = sorted({class_of(picture) for picture in found.values()})

    def encode(picture: Picture) -> tuple[Picture, bytes | None, str]:
        try:
            return picture, encode_png(pixels_of(picture, options.resolution)), ""
        except UserError as error:
            return picture, None, str(error)

    pairs: Counter[tuple[str, str]] = Counter()
    unusable = []
    with progress("converting", len(found)) as advance, image_zip(options.destination, class_names) as writer:
        for picture, content, problem in map_in_order(encode, (found[key] for key in sorted(found))):
            advance()
            if content is None:
                unusable.append(problem)
                continue
            subset = chosen_subsets[base_group(picture.code_points), picture.style]
            if subset == "train" and (picture.style, picture.code_points) in further:
                subset = "tones"
            pairs[picture.style, subset] += 1
            writer.add_encoded(
                f"{subset}/{picture.style}/{picture.code_points}.png",
                content,
                class_names.index(class_of(picture)),
                captions_of(picture.emoji, picture.code_points, picture.style),
            )
        writer.drop_empty_classes()
    return EmojiTextSet(pairs, flags, unnamed, unusable)


def _build_and_report(options: EmojiTextOptions) -> None:
    if find_spec("resvg_py") is None:
        raise UserError("rendering SVG needs resvg-py: pip install -e '.[emoji]'")
    result = build(options)
    names = ("train", "tones", "composition", "heldout")
    print(f"{'style':10}" + "".join(f"{name:>13}" for name in names) + f"{'flags':>9}{'unnamed':>9}")
    for style in STYLES:
        counts = "".join(f"{result.pairs.get((style, name), 0):13,}" for name in names)
        print(f"{style:10}{counts}{result.flags[style]:9,}{result.unnamed[style]:9,}")
    for problem in result.unusable:
        print(f"left out: {problem}", file=sys.stderr)
    total = sum(result.pairs.values())
    print(f"{options.destination}: {total:,} images with captions; left out: {len(result.unusable):,} unusable")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], USAGE, EmojiTextOptions, _build_and_report))
