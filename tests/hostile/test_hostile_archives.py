"""Hostile zips, tars and folders: one-line errors and bounded memory."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from pictures_on_disk import encoded, pixels, pngs, write_folder, write_tar, write_zip
from relay_diffusion.data.convert import Classes, ConvertOptions, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.errors import UserError

SIDE = 8
PICTURE = encoded(pixels(0))


def refused(path: Path, *words: str) -> None:
    """Check that training, evaluation and the converter refuse `path` in one line with these words."""
    readers = {
        "data.dataset.path": lambda: ImageDataset(path, SIDE),
        "images": lambda: list(open_image_set(path, "images").batches(1)),
        "source": lambda: convert(ConvertOptions(str(path), str(path.parent / "out.zip"), SIDE, classes=Classes.none)),
    }
    if path.is_file() and not zipfile.is_zipfile(path):
        readers = {"source": readers["source"]}  # tars are for the converter
    for read in readers.values():
        with pytest.raises(UserError) as caught:
            read()
        message = str(caught.value)
        assert "\n" not in message
        assert str(path) in message
        for word in words:
            assert word in message, message
    assert not (path.parent / "out.zip").exists()


def patched(path: Path, old: bytes, new: bytes, count: int = -1) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, count))
    return path


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    "name", ["/etc/a.png", "../a.png", "x/../../a.png", "..\\a.png", "C:\\a.png", "\\a.png", "x/..\\..\\a.png"]
)
def test_names_outside_the_archive_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    write = write_zip if kind == "zip" else write_tar
    refused(write(tmp_path / f"in.{kind}", {"good.png": PICTURE, name: PICTURE}), "leaves the archive")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_repeated_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.zip"
    for second in ("a.png", "./a.png", ".//a.png"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", PICTURE)
            archive.writestr(second, PICTURE)
        refused(path, "holds 'a.png' twice")
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for _ in range(2):
            info = tarfile.TarInfo("a.png")
            info.size = len(PICTURE)
            archive.addfile(info, io.BytesIO(PICTURE))
    refused(tmp_path / "in.tar", "holds 'a.png' twice")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "in.zip", {"a.png": PICTURE})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[6] |= 1  # the flag, in front of the member and in the directory
    content[directory + 8] |= 1
    path.write_bytes(content)
    refused(path, "'a.png' in", "it is encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(tmp_path: Path, method: int) -> None:
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", PICTURE)
    refused(path, "'a.png' in", "its compression is not supported")


def test_a_truncated_zip_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "in.zip", {"a.png": PICTURE, "b.png": PICTURE})
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        refused(path)  # a tar is cut in test_convert.py


def test_a_zip_with_any_byte_changed(tmp_path: Path) -> None:
    """It is refused in one line, or its images are the ones that were written."""
    path = write_zip(tmp_path / "in.zip", {"a.png": encoded(pixels(0, 4))})
    content, good = path.read_bytes(), ImageDataset(path, 4)[0][0]
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x41
        path.write_bytes(damaged)
        try:
            read = ImageDataset(path, 4)[0][0]
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert read.equal(good)


def test_a_zip_directory_that_disagrees_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "in.zip", {"a.png": PICTURE})
    refused(patched(path, b"a.png", b"b.png", 1), "'a.png' in", "differ")  # in front of the member only
    path = write_zip(tmp_path / "in.zip", {"a.png": PICTURE})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    struct.pack_into("<II", content, directory + 20, len(PICTURE) + 9, len(PICTURE) + 9)
    path.write_bytes(content)
    refused(path, "'a.png' in", "cannot be read")


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "in.zip", {"\u00e9.png": PICTURE})  # flagged as UTF-8
    refused(patched(path, "\u00e9".encode(), b"\xff\xff"), "cut short", "utf-8")
    old = write_zip(tmp_path / "old.zip", {"aa.png": PICTURE})  # not flagged: any byte is a character of MS-DOS
    assert ImageDataset(patched(old, b"aa.png", b"a\x82.png"), SIDE).names == ["a\u00e9.png"]
    archive = write_tar(tmp_path / "in.tar", {"aa.png": PICTURE})
    content = bytearray(archive.read_bytes())
    content[0] = 0xFF
    content[148:156] = b"        "
    content[148:156] = b"%06o\0 " % sum(content[:512])
    archive.write_bytes(content)
    refused(archive, r"the name '\udcffa.png' is not UTF-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.png")).write_bytes(PICTURE)
    refused(folder, r"the name '\udcff.png' is not UTF-8")


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    refused(write_zip(tmp_path / "in.zip", {"a\n\x1b[2J.png": b"no image"}), r"a\n\x1b[2J.png")


def linked(path: Path, target: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.png", PICTURE)
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, target)
    return path


def test_links_in_archives_are_left_out_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = write_folder(tmp_path / "secret", {"secret.png": PICTURE}) / "secret.png"
    assert ImageDataset(linked(tmp_path / "in.zip", str(secret)), SIDE).names == ["good.png"]
    assert capsys.readouterr().out.endswith("in.zip: ignored 1 file of another type (.png (link)): link.png (link)\n")
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, kind in (("good.png", tarfile.REGTYPE), ("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            info.size = len(PICTURE) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(PICTURE))
    destination = tmp_path / "out.zip"
    result = convert(ConvertOptions(str(tmp_path / "in.tar"), str(destination), SIDE, classes=Classes.none))
    assert (result.images, result.ignored) == (1, ["soft.png (link)", "hard.png (link)"])


# --- sizes


def bomb(path: Path, name: str, size: int) -> Path:
    """Build a zip with a deflated member of `size` zeros."""
    zeros = bytes(1 << 20)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        for _ in range(size >> 20):
            file.write(zeros)
    return path


@pytest.mark.slow
def test_a_zip_bomb_takes_no_memory(tmp_path: Path) -> None:
    honest = bomb(tmp_path / "honest.zip", "a.png", 300 << 20)
    lying = tmp_path / "lying.zip"
    lying.write_bytes(honest.read_bytes().replace(struct.pack("<I", 300 << 20), struct.pack("<I", 100)))
    assert honest.stat().st_size < 2_000_000
    tracemalloc.start()
    refused(honest, "'a.png' in", "it claims 314,572,800 bytes, more than 268,435,456")
    refused(lying, "'a.png' in")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_zip_bomb_of_labels_is_refused(tmp_path: Path) -> None:
    path = bomb(tmp_path / "in.zip", "dataset.json", 300 << 20)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a.png", PICTURE)
    with pytest.raises(UserError, match=r"'dataset\.json' in .*it claims 314,572,800 bytes"):
        ImageDataset(path, SIDE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_tar_bomb_takes_no_memory(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.size = kind, (300 if kind == tarfile.REGTYPE else 64) << 20
    path = tmp_path / "in.tar.gz"
    zeros = io.BufferedReader(Zeros(), 1 << 20)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        good = tarfile.TarInfo("good.png")
        good.size = len(PICTURE)
        archive.addfile(good, io.BytesIO(PICTURE))
        archive.addfile(info, zeros)
    tracemalloc.start()
    refused(path, "claims 314,572,800 bytes" if kind == tarfile.REGTYPE else "cut short")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


class Zeros(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return len(buffer)


def test_a_bad_member_of_a_tar_can_be_left_out(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "in.tar", {"bad.png": b"", "good.png": PICTURE})
    options = ConvertOptions(str(path), str(tmp_path / "out.zip"), SIDE, classes=Classes.none, skip_bad=True)
    result = convert(options)
    assert (result.images, len(result.left_out)) == (1, 1)


# --- folders


def test_pipes_devices_and_link_circles_are_refused(tmp_path: Path) -> None:
    for name, make in (
        ("pipe", os.mkfifo),
        ("device", lambda path: path.symlink_to("/dev/zero")),
        ("sparse", lambda path: (path.touch(), os.truncate(path, 1 << 40))),
        ("nowhere", lambda path: path.symlink_to("gone.png")),
        ("folder", lambda path: path.mkdir()),
    ):
        folder = write_folder(tmp_path / name, {"b.png": PICTURE})
        make(folder / "a.png")
        if name == "folder":
            assert ImageDataset(folder, SIDE).names == ["b.png"]
        else:
            refused(folder, "'a.png' in", "cannot be read")
    circle = write_folder(tmp_path / "circle", {"x/b.png": PICTURE})
    (circle / "x/again").symlink_to(circle)
    refused(circle, "leads back to a folder around it")
    both = write_folder(tmp_path / "both", {"a/b.png": PICTURE, "c/b.png": PICTURE})
    (both / "a/toc").symlink_to("../c")
    assert len(ImageDataset(both, SIDE)) == 3  # no circle yet
    (both / "c/toa").symlink_to("../a")
    refused(both, "leads back to a folder around it")


@pytest.mark.parametrize("path", ["a" * 5000, "\0", "~nobody-of-this-name/x.zip", "\ud800"])
def test_invalid_paths_are_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"^data\.dataset\.path="):
        ImageDataset(path, SIDE)
    with pytest.raises(UserError, match=r"^images="):
        open_image_set(path, "images")


def test_a_sampling_run_directory_is_not_an_image_set(tmp_path: Path) -> None:
    """It also holds a picture of another size, which would fail only after all images were evaluated."""
    run = write_folder(tmp_path / "run", pngs([f"images/{k:08}.png" for k in range(3)]) | {"settings.json": b"{}"})
    with pytest.raises(UserError, match=rf"images={run}: is the directory of a run .*use images={run}/images$"):
        open_image_set(run, "images")
    assert len(open_image_set(run / "images", "images")) == 3
