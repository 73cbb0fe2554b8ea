"""Where image bytes and class labels come from: a folder, a zip, a tar or one file, always read in memory.

Free of torch, so that the command line tools start quickly.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn

from relay_diffusion.data.bounded_io import BoundedTarInfo, file_bytes, files_below, is_link, tar_bytes, zip_bytes
from relay_diffusion.data.decode import Decoded, decode
from relay_diffusion.errors import UserError

IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
LABEL_FILE = "dataset.json"
HIDDEN_FILES = ("Thumbs.db", "desktop.ini")  # of Windows, which marks them otherwise than by a dot
REMEDY = "leave it out, or convert with skip_bad=true (python -m relay_diffusion.cli.convert_images)"


class Source(ABC):
    """Image files under one path: `names` in reading order, '/'-separated, hidden files left out.

    `option` is what the user calls this path ("data.dataset.path"); error messages begin with it.
    Errors: UserError when a name is absolute, climbs with '..', is no UTF-8 or comes twice; when there is no image.
    """

    def __init__(self, path: Path, option: str, members: Iterable[str]) -> None:
        self.path, self.option = path, option
        self.members: dict[str, str] = {}  # tidy name -> name as stored
        for stored in members:
            if stored.startswith(("/", "\\")) or re.match("[A-Za-z]:", stored) or ".." in re.split(r"[/\\]", stored):
                raise UserError(f"{option}={path}: the member name {stored!r} is absolute or leaves the archive")
            parts = PurePosixPath(stored).parts
            name = "/".join(parts)
            if not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts):
                continue
            if not _is_utf8(name):
                raise UserError(f"{option}={path}: the name {name!r} is not UTF-8: rename it")
            if name in self.members:
                raise UserError(f"{option}={path}: holds {name!r} twice")
            self.members[name] = stored
        self.names = [name for name in self.members if name.lower().endswith(IMAGE_SUFFIXES)]
        if not self.names:
            raise UserError(f"{option}={path}: holds no image ({', '.join(IMAGE_SUFFIXES)})")

    def ignored(self) -> list[str]:
        """Names of the files that are neither images nor labels, by their endings."""
        known = {*self.names, LABEL_FILE}
        return [name for name in self.members if name not in known and name.rpartition("/")[2] not in HIDDEN_FILES]

    def where(self, name: str) -> str:
        """What to call a member in a message."""
        return f"{name!r} in {self.path}"

    def read(self, name: str) -> bytes:
        """Bytes of one member. Errors: UserError that names it when it cannot be read."""
        try:
            return self._read(self.members[name])
        except Exception as error:  # damaged archives raise a dozen types, and all mean this to the user
            raise self._unreadable(name, error) from error

    def decoded(self, name: str, apply_exif: bool = True) -> Decoded:
        """One image as 8-bit RGB. Errors: UserError that names the option, the image and what to do."""
        try:
            return decode(self.read(name), self.where(name), apply_exif)
        except UserError as error:
            raise UserError(f"{self.option}: {error}: {REMEDY}") from error

    def _unreadable(self, name: str, error: Exception) -> UserError:
        return UserError(f"{self.where(name)} cannot be read: {one_line(error)}")

    @abstractmethod
    def _read(self, stored: str) -> bytes: ...

    def items(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """(name, function that reads its bytes) for every image, in reading order."""
        for name in self.names:
            yield name, partial(self.read, name)


class FolderSource(Source):
    """Images in a folder and its sub-folders, sorted by name; links to folders are followed, but not in circles."""

    kind = "folder"

    def __init__(self, path: Path, option: str) -> None:
        try:
            files = sorted(files_below(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{option}={path}: {one_line(error)}") from None
        super().__init__(path, option, files)

    def _read(self, stored: str) -> bytes:
        return file_bytes(self.path / stored)

    def fingerprint(self, name: str) -> str:
        """Identifies the content of one image; reads it."""
        return hashlib.sha256(self.read(name)).hexdigest()


class FileSource(Source):
    """One image file, named as it is without its folder."""

    kind = "file"

    def __init__(self, path: Path, option: str) -> None:
        super().__init__(path, option, [path.name])

    def where(self, name: str) -> str:  # noqa: ARG002
        """What to call the image in a message."""
        return repr(str(self.path))

    def _read(self, stored: str) -> bytes:  # noqa: ARG002
        return file_bytes(self.path)

    def fingerprint(self, name: str) -> str:
        """Identifies the content of the image; reads it."""
        return hashlib.sha256(self.read(name)).hexdigest()


class ZipSource(Source):
    """Images in a zip, sorted by name; safe to read from forked or spawned workers and from threads.

    Symbolic links in it are left out.
    """

    kind = "zip"

    def __init__(self, path: Path, option: str) -> None:
        self._handle: zipfile.ZipFile | None = None
        self._owner = 0
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted(i.filename for i in archive.infolist() if not (i.is_dir() or is_link(i)))
        except Exception as error:  # foreign bytes: zipfile raises many types
            raise UserError(
                f"{option}={path}: not a zip, or cut short ({one_line(error)}); "
                f"`python -m relay_diffusion.cli.convert_images` makes one from a folder, tar or zip"
            ) from error
        super().__init__(path, option, members)

    def _archive(self) -> zipfile.ZipFile:
        # Opened once per process: a handle inherited through fork shares its file offset with the parent and
        # with the other workers, and reads then return each other's bytes.
        if self._handle is None or self._owner != os.getpid():
            self._handle = zipfile.ZipFile(self.path)
            self._owner = os.getpid()
        return self._handle

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}

    def _read(self, stored: str) -> bytes:
        archive = self._archive()
        return zip_bytes(archive, archive.getinfo(stored))

    def fingerprint(self, name: str) -> str:
        """Identifies the content of one image by the archive's directory; reads nothing else."""
        info = self._archive().getinfo(self.members[name])
        return f"{info.CRC:08x} {info.file_size}"


class TarSource(Source):
    """Images in a tar (plain or compressed), in the archive's order; links inside it are left out."""

    def __init__(self, path: Path, option: str) -> None:
        try:
            with self._opened(path) as archive:
                members = [info.name for info in archive if info.isfile()]
        except Exception as error:  # foreign bytes: tarfile and the decompressors raise many types
            # The error's own text lists every compression it tried, over many lines.
            raise UserError(f"{option}={path}: not a folder, zip or tar, or cut short") from error
        super().__init__(path, option, members)

    @staticmethod
    def _opened(path: Path) -> tarfile.TarFile:
        return tarfile.open(path, tarinfo=BoundedTarInfo)

    def _read(self, stored: str) -> bytes:
        with self._opened(self.path) as archive:
            return tar_bytes(archive, archive.getmember(stored))

    def items(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        # One pass: a compressed tar cannot seek.
        tidy = {self.members[name]: name for name in self.names}
        with self._opened(self.path) as archive:
            for info in archive:
                name = tidy.pop(info.name, None) if info.isfile() else None
                if name is not None:
                    yield name, self._content(archive, info, name)

    def _content(self, archive: tarfile.TarFile, info: tarfile.TarInfo, name: str) -> Callable[[], bytes]:
        """A function that returns what is read now, or raises why it cannot be."""
        try:
            return partial(bytes, tar_bytes(archive, info))
        except Exception as error:  # as in `read`
            return partial(_raise, self._unreadable(name, error))


def _raise(error: UserError) -> NoReturn:
    raise error


def one_line(error: Exception) -> str:
    """What a foreign error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_utf8(name: str) -> bool:
    """Whether a name can be written as UTF-8; bytes that could not be read as it are kept as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def existing_path(path: str | Path, option: str) -> Path:
    """The path with ~ expanded. Errors: UserError naming `option` when nothing is there."""
    try:
        expanded = Path(path).expanduser()
        there = expanded.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long; odd characters; no such user
        raise UserError(f"{option}={path}: cannot be looked for ({one_line(error)})") from None
    if not there:
        raise UserError(f"{option}={path}: no such file or folder")
    return expanded


ImageSource = FolderSource | ZipSource | FileSource
"""What images are read from by name, in any order."""


def open_images(path: str | Path, option: str) -> ImageSource:
    """Open a folder, an image zip or one image file. Errors: UserError naming `option` when it is none of them."""
    expanded = existing_path(path, option)
    if expanded.is_dir():
        return FolderSource(expanded, option)
    if _is_image_file(expanded):
        return FileSource(expanded, option)
    return ZipSource(expanded, option)


def open_source(path: str | Path, option: str) -> Source:
    """Open a folder, zip, tar or image file; archives are told apart by content. Errors: UserError naming `option`."""
    expanded = existing_path(path, option)
    if expanded.is_dir() or zipfile.is_zipfile(expanded) or _is_image_file(expanded):
        return open_images(expanded, option)
    return TarSource(expanded, option)


def _is_image_file(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not zipfile.is_zipfile(path)
