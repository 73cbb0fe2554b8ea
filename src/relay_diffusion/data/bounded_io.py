"""Bounded reading of archive members and files.

Memory grows with the data, not with the sizes in headers.
"""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from relay_diffusion.errors import UserError

MAX_MEMBER = 2**28  # bytes of one image or label file; a larger one is a mistake or hostile
MAX_TAR_HEADER = 2**20  # bytes of a long name or of other extra headers, which tarfile holds in memory
PIECE = 2**20  # bytes read at once, so that memory grows with the content of a file, not with the size in its header


def read_exactly(stream: IO[bytes], size: int) -> bytearray:
    """Read exactly `size` bytes.

    Memory grows with the bytes read. Raises EOFError if there are fewer.
    """
    data = bytearray()
    while len(data) < size:
        piece = stream.read(min(size - len(data), PIECE))
        if not piece:
            raise EOFError("cut short")
        data += piece
    return data


def check_size(size: int, most: int = MAX_MEMBER) -> None:
    """Raise ValueError if the size in a header is above `most` bytes."""
    if size > most:
        raise ValueError(f"it claims {size:,} bytes, more than {most:,}")


def utf8_text(content: bytes, where: str) -> str:
    """Decode a text file, with or without byte order mark. Raises UserError naming `where`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 ({error.reason} at byte {error.start:,}); save it as UTF-8") from error


def check_zip_member(info: zipfile.ZipInfo) -> None:
    """Raise ValueError for an encrypted or unsupported member of a zip.

    Supported are deflate and no compression.
    """
    if info.flag_bits & 0x1:
        raise ValueError("it is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile inflates bzip2 and LZMA data without a limit: a few KiB could exhaust the memory
        raise ValueError("its compression is not supported: use deflate or none")


def zip_bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read one member of a zip and verify its checksum.

    Raises ValueError and zipfile's errors.
    """
    check_zip_member(info)
    check_size(info.file_size)
    with archive.open(info) as stream:
        data = read_exactly(stream, info.file_size)
        stream.read(1)  # zipfile checks an empty member here
        return bytes(data)


def is_link(info: zipfile.ZipInfo) -> bool:
    """Return whether a member of a zip is a symbolic link."""
    return stat.S_ISLNK(info.external_attr >> 16)


class BoundedTarInfo(tarfile.TarInfo):
    """Tar header with a size limit, for tarfile.open."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> BoundedTarInfo:
        """Parse one header; raise ReadError for a large special header.

        tarfile reads the content of special headers into memory.
        """
        info = super().frombuf(buf, encoding, errors)
        if not info.isreg() and info.size > MAX_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes")
        return info


def tar_bytes(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """Read one regular file of a tar.

    Raises ValueError and tarfile's errors.
    """
    check_size(info.size)
    stream = archive.extractfile(info)
    assert stream is not None  # only regular files get here
    return bytes(read_exactly(stream, info.size))


def file_bytes(path: Path) -> bytes:
    """Read a regular file.

    Raises ValueError for a device or a pipe, which may never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    check_size(status.st_size)
    return path.read_bytes()


def files_below(folder: Path) -> Iterator[str]:
    """Yield names of the files in a folder and its sub-folders.

    Links are followed. Raises ValueError for a circle of links.
    """
    # Parent folders are compared by device and inode: a circle may include any number of links.
    above = {os.fspath(folder): {_identity(folder)}}
    for root, folders, names in os.walk(folder, followlinks=True):
        way = above.pop(root)
        for name in folders:
            path = os.path.join(root, name)  # noqa: PTH118
            identity = _identity(path)
            if identity in way:
                raise ValueError(f"the link {path!r} leads back to a folder around it")
            above[path] = way | {identity}
        yield from ((Path(root) / name).relative_to(folder).as_posix() for name in names)


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino
