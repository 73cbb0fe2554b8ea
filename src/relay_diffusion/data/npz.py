"""Reading of untrusted .npz files, and writing of ADM samples."""

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
from relay_diffusion.utils.files import atomic_write
from relay_diffusion.utils.messages import one_line

MAX_ARRAY = 2**30  # bytes of one array of statistics or features, which are held in memory


class ArrayHeader(NamedTuple):
    """Header of an .npy."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]


class Npz:
    """An untrusted .npz whose arrays are read one at a time, without unpickling.

    Errors: UserError, one line with the option and the file, for a file that is not an .npz, is damaged or cut short,
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
        except Exception as error:  # foreign bytes: zipfile, zlib and numpy raise a dozen types
            raise UserError(f"{self.where}: {problem} ({one_line(error)})") from error

    def fingerprint(self) -> str:
        """Checksum and size of every array in the archive's directory; reads nothing else."""
        lines = (f"{key} {self._infos[key].CRC:08x} {self._infos[key].file_size}" for key in sorted(self.keys))
        return "\n".join(lines)

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[ArrayHeader, IO[bytes]]]:
        check_zip_member(self._infos[key])
        with zipfile.ZipFile(self.path) as archive, archive.open(self._infos[key]) as stream:
            if (version := np.lib.format.read_magic(stream)) != (1, 0):
                raise ValueError(f"a header of version {version}, which may be of any size")  # plain arrays have 1.0
            header = ArrayHeader(*np.lib.format.read_array_header_1_0(stream))
            size = int(np.prod([int(side) for side in header.shape], dtype=object)) * header.dtype.itemsize
            if stream.tell() + size != self._infos[key].file_size:
                raise ValueError(f"{header.dtype} of shape {list(header.shape)} is not what follows its header")
            yield header, stream

    def header(self, key: str) -> ArrayHeader:
        """Shape, order and type of an array."""
        with self._readable(f"{key!r} cannot be read"), self._open(key) as (header, _):
            return header

    def read(self, key: str) -> np.ndarray:
        """Read a whole array of numbers or text; check its header first."""
        with self._readable(f"{key!r} cannot be read"), self._open(key) as (header, stream):
            if header.dtype.hasobject:
                raise ValueError("it holds pickled objects")
            check_size(self._infos[key].file_size, MAX_ARRAY)
            data = read_exactly(stream, self._infos[key].file_size - stream.tell())
            array = np.frombuffer(data, header.dtype).reshape(header.shape, order="F" if header.fortran_order else "C")
            return np.ascontiguousarray(array).reshape(header.shape)  # a scalar would become one-dimensional

    def rows(self, key: str, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Rows array[i] of a C-ordered array, for ascending indices; others are skipped."""
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
) -> None:
    """Write uint8 batches [B,3,H,W] as `arr_0`, uint8 [count,H,W,3], and class indices as `arr_1`, int64 [count].

    The write is atomic, and no more than a batch is in memory. Raises ValueError unless there are exactly `count`
    images of size `resolution` (H, W) and as many labels.
    """
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images")
    with atomic_write(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        # zipfile must know beforehand that a member may be large: force_zip64.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *resolution, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for batch in batches:
                pixels = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                if pixels.dtype != np.uint8 or pixels.shape[1:] != (*resolution, 3):
                    raise ValueError(f"expected uint8 [B,3,{resolution[0]},{resolution[1]}], not {list(batch.shape)}")
                written += len(pixels)
                member.write(pixels.tobytes())
        if written != count:
            raise ValueError(f"{written} images, expected {count}")
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int64), allow_pickle=False)
