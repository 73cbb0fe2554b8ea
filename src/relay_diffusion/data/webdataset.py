"""Images in tar shards with WebDataset's layout: `a.png`, `a.cls` and `a.txt` are one sample.

An index of the members gives random access, so that the order depends on the seed and the position alone. The library
webdataset reads shards as streams: its order depends on a buffer, the workers and the number of ranks. It also runs
addresses that begin with pipe: in a shell.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from relay_diffusion.data.bounded_io import BoundedTarInfo, check_size, files_below, read_exactly, utf8_text
from relay_diffusion.data.sources import Source, SourceFormat, check_member_name, existing_path
from relay_diffusion.errors import UserError
from relay_diffusion.utils.messages import one_line, shorten

SUFFIX = ".tar"
CLASS = re.compile(r"\d{1,9}", re.ASCII)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass(frozen=True)
class WebDatasetFormat(SourceFormat):
    """Tar shards: a .tar file, or a folder of them.

    image_extensions, label_extension, caption_extension: of the members of a sample. An extension is what follows the
    first dot of the file name.
    """

    image_extensions: Sequence[str] = ("png", "webp", "jpg", "jpeg")
    label_extension: str = "cls"
    caption_extension: str = "txt"

    def open(self, path: str | Path, option: str, subset: str = "") -> Source:  # noqa: ARG002
        """Index the shards under a path."""
        images = {str(extension).lower() for extension in self.image_extensions}
        return ShardSource(existing_path(path, option), option, images, self.label_extension, self.caption_extension)


class ShardSource(Source):
    """Images in tar shards.

    Shards are sorted, and members are in the order of the archive. Members are named SHARD/MEMBER. Links are ignored.
    The headers of all shards are read once; each read opens its shard again, so that forked and spawned workers and
    threads can read. Raises UserError for a compressed or damaged shard, and for two images of one sample.
    """

    kind = "webdataset"
    convertible = False

    def __init__(self, path: Path, option: str, images: set[str], label: str, caption: str) -> None:
        self._images, self._label, self._caption = images, label, caption
        self.described_in = f"its members .{label} and .{caption}"
        self.no_captions = f"has no members .{caption}; use text=none, or data.dataset.format.caption_extension"
        self._places: dict[str, _Place] = {}
        links: list[str] = []
        for shard in _shards(path, option):
            name = shard.relative_to(path if path.is_dir() else path.parent).as_posix()
            members, ignored = _index(shard, name, f"{option}={path}")
            self._places |= members
            links += ignored
        super().__init__(path, option, self._places, links)
        keys = [_sample(name)[0] for name in self.names]
        if len(set(keys)) < len(keys):
            key = next(key for key, after in zip(sorted(keys), sorted(keys)[1:], strict=False) if key == after)
            raise UserError(
                f"{option}={path}: the sample {key!r} has several images; set data.dataset.format.image_extensions to "
                "the extension of one"
            )

    def _is_image(self, name: str) -> bool:
        return _sample(name)[1] in self._images

    def ignored(self, subset: str = "") -> list[str]:
        """Return names of members that are neither images, labels nor captions."""
        return [name for name in super().ignored(subset) if _sample(name)[1] not in (self._label, self._caption)]

    def label_entries(self) -> tuple[object, object]:
        """Read the class index of each sample; None without any.

        Raises UserError naming a member that holds something else.
        """
        labels = []
        for name, member, text in self._texts(self._label):
            if not CLASS.fullmatch(text.strip()):
                raise UserError(
                    f"{self.option}: {self.where(member)} holds {shorten(text, 20)!r}, but a class is a number from 0; "
                    "correct it, or use data.dataset.labels=false"
                )
            labels.append((name, int(text)))
        return labels or None, None

    def caption_entries(self) -> object:
        """Read the captions of each sample, one per line."""
        return [(name, text.splitlines()) for name, _, text in self._texts(self._caption)]

    def _texts(self, extension: str) -> Iterator[tuple[str, str, str]]:
        """Yield (image, member, text) of the members with an extension."""
        images = {_sample(name)[0]: name for name in self.names}
        for member in self.members:
            key, found = _sample(member)
            if found == extension and key in images:
                yield images[key], member, utf8_text(self.read(member), self.where(member))

    def _read(self, member: str) -> bytes:
        shard, offset, size = self._places[member]
        check_size(size)
        with shard.open("rb") as file:
            file.seek(offset)
            return bytes(read_exactly(file, size))


class _Place(NamedTuple):
    """Shard of a member, and position of its content in bytes."""

    shard: Path
    offset: int
    size: int


def _sample(name: str) -> tuple[str, str]:
    """Split the name of a member into sample and extension."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


def _shards(path: Path, option: str) -> list[Path]:
    """Find the shards of a folder, sorted; or the file itself."""
    if not path.is_dir():
        return [path]
    try:
        shards = sorted(path / name for name in files_below(path) if name.lower().endswith(SUFFIX))
    except (OSError, ValueError) as error:
        raise UserError(f"{option}={path}: {one_line(error)}") from None
    if not shards:
        raise UserError(f"{option}={path}: holds no {SUFFIX} file; decompress shards, or use data=folder for images")
    return shards


def _index(shard: Path, name: str, where: str) -> tuple[dict[str, _Place], list[str]]:
    """Read the headers of a shard: places of its files, and names of its links.

    name: of the shard in messages. Raises UserError for names that leave the archive or occur twice, and for damage.
    """
    places: dict[str, _Place] = {}
    links = []
    try:
        with shard.open("rb") as file:
            # "r:": compressed archives have no random access
            with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as archive:
                for info in archive:
                    check_member_name(info.name, f"{where}: {name!r}")
                    member = f"{name}/{info.name}"
                    if info.issym() or info.islnk():
                        links.append(member)
                    elif info.issparse():
                        raise ValueError(f"{info.name!r} is a sparse file")
                    elif info.isfile():
                        if member in places:
                            raise UserError(f"{where}: holds {member!r} twice; rename one")
                        places[member] = _Place(shard, info.offset_data, info.size)
                end = archive.offset
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end of the archive
                raise ValueError(f"the header at byte {end:,} is damaged")
    except UserError:
        raise
    except Exception as error:  # untrusted bytes: tarfile raises many exception types
        problem = f"cannot be read as a tar archive ({one_line(error)}); copy it again, or choose its data format"
        if _is_compressed(shard):
            problem = "is compressed, which allows no random access; decompress it"
        raise UserError(f"{where}: the shard {name!r} {problem}") from error
    return places, links


def _is_compressed(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(8).startswith(COMPRESSED)
    return False
