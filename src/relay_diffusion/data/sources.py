"""Image files and labels of a folder, zip, tar or file.

Members are read into memory, never extracted. Imports no torch, so that command line tools start quickly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn

from relay_diffusion.data.bounded_io import BoundedTarInfo, file_bytes, files_below, is_link, tar_bytes, zip_bytes
from relay_diffusion.data.decode import Decoded, decode, header_size
from relay_diffusion.errors import UserError
from relay_diffusion.utils.messages import first_names, one_line

IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
LABEL_FILE = "dataset.json"
HIDDEN_FILES = ("Thumbs.db", "desktop.ini")  # Windows hides these by an attribute instead of a dot
SHOWN_SUFFIXES = 8  # of files that are skipped
CONVERTER = "`python -m relay_diffusion.cli.convert_images`"


class Source(ABC):
    """Image files under one path.

    `names`: in reading order, '/'-separated, without hidden files. `option`: the user's name of this path
    ("data.dataset.path"), with which messages begin. links: members of an archive that are not followed. Raises
    UserError for a name that is absolute, contains '..', is not UTF-8 or occurs twice, and for a source without images.
    """

    kind: str
    path: Path | str  # text: an address on the Hub
    otherwise = "remove it"  # instead of repairing an unusable image
    convertible = True  # `relay_diffusion.cli.convert_images` reads it
    described_in = LABEL_FILE  # where labels and captions come from, in messages
    no_captions = f"has no captions in {LABEL_FILE}; use text=none, or add them with captions= of {CONVERTER}"

    def __init__(self, path: Path | str, option: str, members: Iterable[str], links: Iterable[str] = ()) -> None:
        self.path, self.option = path, option
        self.members: dict[str, str] = {}  # normalized name -> name in the archive
        for member in members:
            check_member_name(member, f"{option}={path}")
            parts = PurePosixPath(member).parts
            name = "/".join(parts)
            if _hidden(parts):
                continue
            if name.encode(errors="ignore").decode() != name:  # Python decodes bytes that are not UTF-8 as surrogates
                raise UserError(f"{option}={path}: the name {name!r} is not UTF-8; rename it")
            if name in self.members:
                raise UserError(f"{option}={path}: holds {name!r} twice; rename one")
            self.members[name] = member
        self.names = [name for name in self.members if self._is_image(name)]
        self._links = [link for link in links if not _hidden(PurePosixPath(link).parts)]
        if not self.names:
            ignored = self.ignored()
            others = f", but {describe_files(ignored)}; save images as PNG" if ignored else ""
            raise UserError(f"{option}={path}: holds no image ({', '.join(IMAGE_SUFFIXES)}){others}")

    def _is_image(self, name: str) -> bool:
        return name.lower().endswith(IMAGE_SUFFIXES)

    def label_entries(self) -> tuple[object, object]:
        """Read "labels" and "classes" of dataset.json, unchecked; None for a missing one.

        Raises UserError naming the file if it is not a JSON object.
        """
        content = self._description()
        return content.get("labels"), content.get("classes")

    def caption_entries(self) -> object:
        """Read "captions" of dataset.json, unchecked; None without captions."""
        return self._description().get("captions")

    def _description(self) -> dict[str, object]:
        if LABEL_FILE not in self.members:
            return {}
        where = f"{self.option}={self.path}: {LABEL_FILE}"
        try:
            content = json.loads(self.read(LABEL_FILE))
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON ({one_line(error)})") from error
        if not isinstance(content, dict):
            raise UserError(f'{where} must be an object with the key "labels"')
        return content

    def names_in(self, subset: str) -> list[str]:
        """Return names of the images in a folder; "" selects all.

        Raises UserError if there are none.
        """
        folder = subset.strip("/")
        names = [name for name in self.names if not folder or name.startswith(f"{folder}/")]
        if not names:
            folders = ", ".join(sorted({name.split("/")[0] for name in self.names if "/" in name}))
            available = folders or "none (the images are not in folders)"
            raise UserError(
                f"{self.option}={self.path}: no images in its folder subset={subset!r}; available: {available}"
            )
        return names

    def ignored(self, subset: str = "") -> list[str]:
        """Return names of files that are neither images nor labels.

        By their suffixes; links of an archive are included. subset: those in a folder.
        """
        known, folder = {*self.names, LABEL_FILE}, subset.strip("/")
        others = [name for name in self.members if name not in known and name.rpartition("/")[2] not in HIDDEN_FILES]
        others += [f"{link} (link)" for link in self._links]
        return [name for name in others if not folder or name.startswith(f"{folder}/")]

    def ignored_note(self, subset: str = "") -> str:
        """Describe what is ignored; "" if nothing is."""
        ignored = self.ignored(subset)
        return describe_files(ignored) if ignored else ""

    def where(self, name: str) -> str:
        """Describe a member in a message."""
        return f"{name!r} in {self.path}"

    def read(self, name: str) -> bytes:
        """Read one member. Raises UserError that names it if it is unreadable."""
        try:
            return self._read(self.members[name])
        except Exception as error:  # damaged archives raise many exception types
            raise self._unreadable(name, error) from error

    def decoded(self, name: str, apply_exif: bool = True, channels: int = 3, apply_profile: bool = False) -> Decoded:
        """Decode one image to 8 bits.

        channels, apply_profile: as in `decode`. Raises UserError that names the option, the image and the remedy.
        """
        with self._remedied():
            where = self.where(name)
            return decode(self.read(name), where, apply_exif, channels=channels, apply_profile=apply_profile)

    def size(self, name: str, apply_exif: bool = True) -> tuple[int, int]:
        """Read height and width of one image from its header.

        Raises UserError that names the option, the image and the remedy.
        """
        with self._remedied():
            return header_size(self.read(name), self.where(name), apply_exif)

    @contextmanager
    def _remedied(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.option}: {error}, or {self.otherwise}") from error

    def fingerprint(self, name: str) -> str:
        """Hash the content of one image, which is read (hexadecimal)."""
        return hashlib.sha256(self.read(name)).hexdigest()

    def _unreadable(self, name: str, error: Exception) -> UserError:
        return UserError(f"{self.where(name)} cannot be read: {one_line(error)}; replace it")

    @abstractmethod
    def _read(self, member: str) -> bytes: ...

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Yield (name, function that reads its bytes) of members.

        names: of members, in reading order; by default those of all images.
        """
        for name in self.names if names is None else names:
            yield name, partial(self.read, name)


class FolderSource(Source):
    """Images in a folder and its sub-folders, sorted by name.

    Links to folders are followed; a circle of links is an error.
    """

    kind = "folder"
    path: Path

    def __init__(self, path: Path, option: str) -> None:
        try:
            files = sorted(files_below(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{option}={path}: {one_line(error)}") from None
        super().__init__(path, option, files)

    def _read(self, member: str) -> bytes:
        return file_bytes(self.path / member)


class FileSource(Source):
    """Single image file, named without its folder."""

    kind = "file"
    path: Path
    otherwise = "use another file"

    def __init__(self, path: Path, option: str) -> None:
        super().__init__(path, option, [path.name])

    def where(self, name: str) -> str:  # noqa: ARG002
        """Describe the image in a message."""
        return repr(str(self.path))

    def _read(self, member: str) -> bytes:  # noqa: ARG002
        return file_bytes(self.path)


class ZipSource(Source):
    """Images in a zip, sorted by name; symbolic links are ignored.

    Forked and spawned workers and threads can read from it.
    """

    kind = "zip"

    def __init__(self, path: Path, option: str) -> None:
        self._handle: zipfile.ZipFile | None = None
        self._owner = 0
        try:
            with zipfile.ZipFile(path) as archive:
                files = [info for info in archive.infolist() if not info.is_dir()]
            members = sorted(info.filename for info in files if not is_link(info))
        except Exception as error:  # untrusted bytes: zipfile raises many exception types
            raise UserError(
                f"{option}={path}: not a zip, or cut short ({one_line(error)}); "
                f"{CONVERTER} makes one from a folder, tar or zip"
            ) from error
        super().__init__(path, option, members, [info.filename for info in files if is_link(info)])

    def _archive(self) -> zipfile.ZipFile:
        # Opened once per process: a handle inherited through fork shares its file offset with the parent and
        # with the other workers, and reads then return each other's bytes.
        if self._handle is None or self._owner != os.getpid():
            self._handle = zipfile.ZipFile(self.path)
            self._owner = os.getpid()
        return self._handle

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}

    def _read(self, member: str) -> bytes:
        archive = self._archive()
        return zip_bytes(archive, archive.getinfo(member))

    def fingerprint(self, name: str) -> str:
        """Return checksum and size of one image.

        Only the archive's directory is read.
        """
        info = self._archive().getinfo(self.members[name])
        return f"{info.CRC:08x} {info.file_size}"


class TarSource(Source):
    """Images in a tar in the archive's order; links are ignored.

    Plain or compressed.
    """

    kind = "tar"
    path: Path

    def __init__(self, path: Path, option: str) -> None:
        try:
            with self._opened(path) as archive:
                infos = [info for info in archive if not info.isdir()]
        except Exception as error:  # untrusted bytes: tarfile and the decompressors raise many exception types
            # tarfile's message lists every compression it tried, over many lines.
            raise UserError(
                f"{option}={path}: not a folder, zip or tar, or cut short; save an image as PNG, copy an archive again"
            ) from error
        members = [info.name for info in infos if info.isfile()]
        super().__init__(path, option, members, [info.name for info in infos if info.issym() or info.islnk()])

    @staticmethod
    def _opened(path: Path) -> tarfile.TarFile:
        return tarfile.open(path, tarinfo=BoundedTarInfo)

    def _read(self, member: str) -> bytes:
        with self._opened(self.path) as archive:
            return tar_bytes(archive, archive.getmember(member))

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Yield (name, function that gives its bytes) of members, in the archive's order."""
        # Read in one pass: a compressed tar cannot seek.
        wanted = {self.members[name]: name for name in (self.names if names is None else names)}
        with self._opened(self.path) as archive:
            for info in archive:
                name = wanted.pop(info.name, None) if info.isfile() else None
                if name is not None:
                    yield name, self._content(archive, info, name)

    def _content(self, archive: tarfile.TarFile, info: tarfile.TarInfo, name: str) -> Callable[[], bytes]:
        """Read a member now; return a function that gives its bytes.

        The function raises the error if the member is unreadable.
        """
        try:
            return partial(bytes, tar_bytes(archive, info))
        except Exception as error:  # as in `read`
            return partial(_raise, self._unreadable(name, error))


class SourceFormat(ABC):
    """Format that is chosen by an option, not recognized by its content."""

    @abstractmethod
    def open(self, path: str | Path, option: str, subset: str = "") -> Source:
        """Open a path.

        option: its name in messages. subset: as in `ImageDataset`. Raises UserError naming `option`.
        """


def check_member_name(member: str, where: str) -> None:
    """Raise UserError if a member's name is absolute or contains '..'."""
    if member.startswith(("/", "\\")) or re.match("[A-Za-z]:", member) or ".." in re.split(r"[/\\]", member):
        raise UserError(f"{where}: the member name {member!r} is absolute or leaves the archive; rename it")


def describe_files(names: Sequence[str]) -> str:
    """Describe files of other types: number, most frequent suffixes and first names."""
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
    shown = sorted(suffix for suffix, _ in suffixes.most_common(SHOWN_SUFFIXES))
    more = ", ..." if len(suffixes) > len(shown) else ""
    what = "file of another type" if len(names) == 1 else "files of other types"
    return f"{len(names):,} {what} ({', '.join(shown)}{more}): {first_names(names)}"


def _hidden(parts: Sequence[str]) -> bool:
    return not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _raise(error: UserError) -> NoReturn:
    raise error


def existing_path(path: str | Path, option: str) -> Path:
    """Return the path with ~ expanded.

    Raises UserError naming `option` if it does not exist.
    """
    try:
        expanded = Path(path).expanduser()
        exists = expanded.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long; odd characters; no such user
        raise UserError(f"{option}={path}: is not a valid path ({one_line(error)})") from None
    if not exists:
        raise UserError(f"{option}={path}: no such file or folder")
    return expanded


def open_source(path: str | Path, option: str, tar: bool = False) -> Source:
    """Open a folder, image zip, image file or, with `tar`, a tar.

    Archives are recognized by their content. A tar is fast to read only in its own order. Raises UserError naming
    `option`.
    """
    expanded = existing_path(path, option)
    if expanded.is_dir():
        return FolderSource(expanded, option)
    if zipfile.is_zipfile(expanded):
        return ZipSource(expanded, option)
    if expanded.suffix.lower() in IMAGE_SUFFIXES and expanded.is_file():
        return FileSource(expanded, option)
    if tar:
        return TarSource(expanded, option)
    start = b""
    with suppress(OSError), expanded.open("rb") as file:  # ZipSource reports a file that cannot be read
        start = file.read(2)
    if start not in (b"", b"PK"):
        raise UserError(
            f"{option}={path}: is neither an image ({', '.join(IMAGE_SUFFIXES)}) nor a zip; save an image as PNG, or "
            f"make a zip of a tar with {CONVERTER}"
        )
    return ZipSource(expanded, option)
