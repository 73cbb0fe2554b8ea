from __future__ import annotations

import csv
import io
import json
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from make_photos import COLUMNS, PhotosOptions, build, read_table, reduced, resource
from pictures_on_disk import encoded, pixels
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.errors import UserError

NOTICE = Path(__file__).parents[2] / "demo" / "NOTICE.md"
MEMBER = "app/resource/bird.webp"
FREE = {"public domain", "CC0-1.0", "GPL-2+", "MIT", "BSD-2-Clause", "BSD-3-Clause"}
FREE |= {f"CC-BY-{v}" for v in ("2.0", "3.0", "4.0")} | {f"CC-BY-SA-{v}" for v in ("3.0", "4.0")}


def resource_file(files: dict[str, bytes], version: int = 3, flags: int = 0) -> bytes:
    """A Qt resource file of files in folders app/resource."""
    names, contents, tree = b"", b"", b""

    def entry(name: str, *fields: object) -> bytes:
        nonlocal names
        offset = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return struct.pack(">I", offset) + struct.pack(*fields) + bytes(0 if version == 1 else 8)

    tree += entry("", ">HII", 2, 1, 1) + entry("app", ">HII", 2, 1, 2) + entry("resource", ">HII", 2, len(files), 3)
    for name, data in files.items():
        tree += entry(name, ">HHHI", flags, 0, 0, len(contents))
        contents += struct.pack(">I", len(data)) + data
    size = 20 if version < 3 else 24
    places = size, size + len(tree), size + len(tree) + len(contents)
    return b"qres" + struct.pack(">4I", version, *places) + bytes(size - 20) + tree + contents + names


@pytest.fixture
def options(tmp_path: Path) -> PhotosOptions:
    packages = tmp_path / "packages"
    (packages / "usr").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    lake = encoded(Image.fromarray(pixels(1, 8)).resize((300, 200)), "JPEG", exif=exif)
    (packages / "usr" / "lake.jpg").write_bytes(lake)
    bird = resource_file({"other.webp": b"?", "bird.webp": encoded(pixels(2, 100), "WEBP", lossless=True)})
    (packages / "usr" / "birds.rcc").write_bytes(bird)
    rows = [
        {"name": "lake", "subset": "train", "file": "usr/lake.jpg"},
        {"name": "bird", "subset": "heldout", "file": f"usr/birds.rcc/{MEMBER}"},
    ]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="1")
        writer.writeheader()
        writer.writerows(rows)
    return PhotosOptions(str(packages), str(tmp_path / "photos.zip"), str(tmp_path / "table.csv"))


def test_photographs_are_upright_and_reduced(options: PhotosOptions) -> None:
    assert build(options) == {"train": 1, "heldout": 1}
    with zipfile.ZipFile(options.destination) as archive:
        sizes = {name: Image.open(io.BytesIO(archive.read(name))).size for name in archive.namelist()[:2]}
        assert sizes == {"train/lake.jpg": (160, 240), "heldout/bird.jpg": (80, 80)}
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
    dataset = ImageDataset(options.destination, 80, subset="heldout", random_crops=1)
    expected = np.asarray(Image.fromarray(pixels(2, 100)).resize((80, 80), Image.Resampling.LANCZOS))
    assert np.abs(dataset[0][0].permute(1, 2, 0).numpy() - expected.astype(int)).mean() < 5


def test_large_photographs_have_one_size() -> None:
    assert reduced(Image.new("RGB", (4000, 3000))).size == (1280, 960)
    assert reduced(Image.new("RGB", (600, 1000))).size == (480, 800)


def test_profiles_are_converted(options: PhotosOptions) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")
    image = encoded(Image.new("RGB", (40, 40), (90, 200, 40)), "JPEG", icc_profile=swapped)
    (Path(options.packages) / "usr" / "lake.jpg").write_bytes(image)
    build(options)
    with zipfile.ZipFile(options.destination) as archive:
        found = np.asarray(Image.open(io.BytesIO(archive.read("train/lake.jpg"))))
    assert np.abs(found.mean((0, 1)) - (200, 90, 40)).max() < 4


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_inside_resource_files(version: int) -> None:
    data = resource_file({"a.webp": b"first", "bird.webp": b"second", "c": b""}, version)
    assert resource(data, MEMBER) == b"second"
    with pytest.raises(ValueError, match="no song"):
        resource(data, "app/song/bird.webp")
    with pytest.raises(ValueError, match="compressed"):
        resource(resource_file({"bird.webp": b""}, version, flags=1), MEMBER)


@pytest.mark.parametrize("damage", [b"", b"qres", b"no resource"])
def test_a_missing_or_damaged_package_is_named(options: PhotosOptions, damage: bytes) -> None:
    file = Path(options.packages) / "usr" / "birds.rcc"
    file.write_bytes(damage)
    with pytest.raises(UserError, match=rf"packages=.*: cannot read usr/birds\.rcc/{MEMBER} \(.*\); unpack 1 1 there"):
        build(options)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read usr/birds"):
        build(options)
    assert not Path(options.destination).exists()


def test_another_table_is_refused(options: PhotosOptions, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("name\n")
    with pytest.raises(UserError, match=r"table=.*: must have the columns name,subset,package"):
        build(options)


def test_every_listed_photograph_has_an_author_and_a_free_license() -> None:
    rows = read_table(PhotosOptions.table)
    assert Counter(row["subset"] for row in rows) == {"train": 413, "validation": 12, "heldout": 19}
    assert len({row["name"] for row in rows}) == len({row["file"] for row in rows}) == len(rows)
    for row in rows:
        assert row["license"] in FREE, row
        assert all(row[column] for column in COLUMNS[:-1]), row
    for (package, version), count in Counter((row["package"], row["version"]) for row in rows).items():
        assert f"| `{package}` {version} | {count} |" in NOTICE.read_text()
