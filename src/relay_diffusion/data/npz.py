"""Reader of untrusted .npz files, and writer of ADM samples."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from torch import Tensor

from relay_diffusion.data.bounded_io import check_size, check_zip_member, read_exactly
from relay_diffusion.errors import UserError
from relay_diffusion.utils.alpha import straight
from relay_diffusion.utils.files import atomic_write
from relay_diffusion.utils.messages import one_line

MAX_ARRAY = 2**30  # byte limit of one array of statistics or features, which are held in memory


class ArrayHeader(NamedTuple):
    """Header of an .npy member."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]


class Npz:
    """Untrusted .npz, read one array at a time without unpickling.

    Raises UserError, one line with the option and the file, for a file that is not an .npz, is damaged or truncated,
    or whose arrays do not have the size in their header.
    """

    def __init__(self, path: Path, option: str) -> None:
        self.path, self.where = path, f"{option}={path}"
        with self._readable("not a readable .npz"), zipfile.ZipFile(path) as archive:
            arrays = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        self._infos = {info.filename.removesuffix(".npy"): info for info in arrays}
        self.keys = list(self._infos)

    @contextmanager
    def _readable(self, problem: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # untrusted bytes: zipfile, zlib and numpy raise many exception types
            raise UserError(f"{self.where}: {problem} ({one_line(error)})") from error

    def fingerprint(self) -> str:
        """Return checksum and size of every array.

        Only the archive's directory is read.
        """
        lines = (f"{key} {self._infos[key].CRC:08x} {self._infos[key].file_size}" for key in sorted(self.keys))
        return "\n".join(lines)

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[ArrayHeader, IO[bytes]]]:
        check_zip_member(self._infos[key])
        with zipfile.ZipFile(self.path) as archive, archive.open(self._infos[key]) as stream:
            if (version := np.lib.format.read_magic(stream)) != (1, 0):
                raise ValueError(f"a header of version {version}, which may be of any size")  # plain arrays: 1.0
            header = ArrayHeader(*np.lib.format.read_array_header_1_0(stream))
            size = int(np.prod([int(side) for side in header.shape], dtype=object)) * header.dtype.itemsize
            if stream.tell() + size != self._infos[key].file_size:
                raise ValueError(f"{header.dtype} of shape {list(header.shape)} does not match the size of its data")
            yield header, stream

    def header(self, key: str) -> ArrayHeader:
        """Return shape, order and dtype of an array."""
        with self._readable(f"{key!r} cannot be read"), self._open(key) as (header, _):
            return header

    def read(self, key: str) -> np.ndarray:
        """Read a whole array of numbers or text.

        Its header is checked first.
        """
        with self._readable(f"{key!r} cannot be read"), self._open(key) as (header, stream):
            if header.dtype.hasobject:
                raise ValueError("it holds pickled objects")
            check_size(self._infos[key].file_size, MAX_ARRAY)
            data = read_exactly(stream, self._infos[key].file_size - stream.tell())
            array = np.frombuffer(data, header.dtype).reshape(header.shape, order="F" if header.fortran_order else "C")
            return np.ascontiguousarray(array).reshape(header.shape)  # a scalar would become one-dimensional

    def rows(self, key: str, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Yield rows array[i] of a C-ordered array, for ascending indices."""
        with self._readable(f"{key!r} cannot be read"), self._open(key) as (header, stream):
            shape, at = header.shape[1:], 0
            size = int(np.prod(shape)) * header.dtype.itemsize
            for index in indices:
                stream.seek((index - at) * size, os.SEEK_CUR)
                at = index + 1
                yield np.frombuffer(read_exactly(stream, size), header.dtype).reshape(shape)


def write_adm_samples(
    path: str | Path,
    batches: Iterable[Tensor],
    count: int,
    resolution: tuple[int, int],
    labels: Sequence[int] | None = None,
    channels: int = 3,
    synced: bool = True,
) -> None:
    """Write images and labels as an ADM sample .npz.

    batches: uint8 [B,C,H,W], stored as `arr_0`, uint8 [count,H,W,C], RGBA with straight colors; labels as `arr_1`,
    int64 [count].
    The write is atomic, and at most one batch is in memory. synced: as for `atomic_write`. Raises ValueError unless
    there are exactly `count` images of C channels and size `resolution` (H, W), and as many labels.
    """
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images")
    with atomic_write(Path(path), synced=synced) as file, zipfile.ZipFile(file, "w") as archive:
        # force_zip64: zipfile must know in advance that a member may be large.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *resolution, channels)}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for batch in batches:
                pixels = straight(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy())
                if pixels.dtype != np.uint8 or pixels.shape[1:] != (*resolution, channels):
                    wanted = ",".join(map(str, (channels, *resolution)))
                    raise ValueError(f"expected uint8 [B,{wanted}], not {list(batch.shape)}")
                written += len(pixels)
                member.write(pixels.tobytes())
        if written != count:
            raise ValueError(f"{written} images, expected {count}")
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int64), allow_pickle=False)
