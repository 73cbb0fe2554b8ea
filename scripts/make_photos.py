"""Collect free photographs of Debian packages in an image zip.

demo/photos.csv lists them with author and license: 413 for training, 12 for validation, 19 held out.
"""

from __future__ import annotations

import csv
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from omegaconf import MISSING
from PIL import Image, ImageCms, ImageOps

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.sources import existing_path
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import refuse_existing
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.progress import progress

USAGE = """\
python scripts/make_photos.py packages=FOLDER destination=OUT.zip [key=value ...]

  packages     folder with the unpacked packages, made by
                 apt-get download endless-sky-data forensics-samples-files gcompris-qt-data kphotoalbum \\
                     libelementary-data libjs-jquery-backstretch libjs-jquery-colorbox lomiri-wallpapers-16.04 \\
                     lomiri-wallpapers-20.04 lxqt-themes mate-backgrounds palapeli-data plasma-workspace-wallpapers \\
                     python-kivy-examples python3-sklearn qtwebengine5-examples sddm-theme-maldives tuxpaint-data
                 for p in *.deb; do dpkg -x $p FOLDER; done
  destination  the zip to write: train/*.jpg, validation/*.jpg and heldout/*.jpg
  table        the photographs (demo/photos.csv)
  overwrite    false: refuse a destination that exists (default) | true: replace it once all is converted
"""
COLUMNS = ["name", "subset", "package", "version", "file", "author", "license", "source"]
LARGEST = 1280  # pixels of the longer side: all photographs together take 40 MB
REDUCTION = 0.8  # at most this of the original side: the finest structure of files is blurred by camera and compression
QUALITY = 95
RESOURCES = ".rcc/"  # between the path of a Qt resource file and the path of a photograph inside it
COMPRESSED = 1 | 4  # flags of an entry in a Qt resource file: zlib, zstd


@dataclass
class PhotosOptions:
    """Options of this command; see USAGE."""

    packages: str = MISSING
    destination: str = MISSING
    table: str = str(Path(__file__).parents[1] / "demo" / "photos.csv")
    overwrite: bool = False


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of the photographs. Raises UserError naming `table`."""
    with existing_path(path, "table").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or []) != COLUMNS:
            raise UserError(f"table={path}: must have the columns {','.join(COLUMNS)}")
        return list(reader)


def resource(data: bytes, path: str) -> bytes:
    """Read a file inside a Qt resource file (.rcc).

    Its tree has entries of equal size: a name, flags, and the children of a folder or the place of a file.
    Raises ValueError if the file is missing or compressed.
    """
    if data[:4] != b"qres":
        raise ValueError("not a Qt resource file")
    version, tree, contents, names = struct.unpack_from(">4I", data, 4)
    size = 14 if version == 1 else 22  # later versions add the time of modification

    def name_of(entry: int) -> str:
        (offset,) = struct.unpack_from(">I", data, entry)
        (length,) = struct.unpack_from(">H", data, names + offset)
        return data[names + offset + 6 :][: 2 * length].decode("utf-16-be")  # after length and hash

    entry = tree
    for part in path.split("/"):
        count, first = struct.unpack_from(">2I", data, entry + 6)
        children = {name_of(child): child for child in range(tree + size * first, tree + size * (first + count), size)}
        if part not in children:
            raise ValueError(f"no {part}")
        entry = children[part]
    flags, start = struct.unpack_from(">H4xI", data, entry + 4)
    if flags & COMPRESSED:
        raise ValueError(f"{path} is compressed")
    (length,) = struct.unpack_from(">I", data, contents + start)
    return data[contents + start + 4 :][:length]


def read_photograph(packages: Path, file: str) -> Image.Image:
    """Read a photograph upright and in sRGB."""
    outer, inside, member = file.partition(RESOURCES)
    data = (packages / (outer + inside.rstrip("/"))).read_bytes()
    image = Image.open(BytesIO(resource(data, member) if inside else data))
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image).convert("RGB")
    if profile:
        source, target = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
        ImageCms.profileToProfile(image, source, target, inPlace=True)
    return image


def reduced(image: Image.Image) -> Image.Image:
    """Reduce a photograph to its side in the zip."""
    scale = min(REDUCTION, LARGEST / max(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def build(options: PhotosOptions) -> Counter[str]:
    """Write the zip; return the photographs of each subset.

    Raises UserError without changing the destination.
    """
    refuse_existing(Path(options.destination).expanduser(), "destination", options.overwrite)
    packages, rows = existing_path(options.packages, "packages"), read_table(options.table)

    def encode(row: dict[str, str]) -> bytes:
        try:
            image = reduced(read_photograph(packages, row["file"]))
        except (OSError, ValueError, struct.error, ImageCms.PyCMSError) as error:
            raise UserError(
                f"packages={options.packages}: cannot read {row['file']} ({error}); unpack {row['package']} "
                f"{row['version']} there"
            ) from None
        stream = BytesIO()
        image.save(stream, "JPEG", quality=QUALITY, subsampling="4:4:4", optimize=True)
        return stream.getvalue()

    with progress("converting", len(rows)) as advance, image_zip(options.destination) as writer:
        for row, content in zip(rows, map_in_order(encode, rows), strict=True):
            writer.add_encoded(f"{row['subset']}/{row['name']}.jpg", content)
            advance()
    return Counter(row["subset"] for row in rows)


def _build_and_report(options: PhotosOptions) -> None:
    subsets = build(options)
    counts = ", ".join(f"{count} {subset}" for subset, count in sorted(subsets.items()))
    print(f"{options.destination}: {subsets.total()} photographs ({counts})")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], USAGE, PhotosOptions, _build_and_report))
