"""EDM pickles and `torch.save` files of whole modules, read as data: nothing that a file holds is ever run.

The records of a pickle (see records.py) are turned into plain values by the table at the end of this file, for the
globals that the authors' checkpoints name. Tensors come from the bytes beside the pickle, when they are asked for.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from torch import Tensor

from relay_diffusion.checkpoints.published.records import Global, Pickle, Record, Reference, read_records
from relay_diffusion.checkpoints.published.storages import STORAGES, Storage, ZipStorages, nested_storage, read_member
from relay_diffusion.errors import UserError

MAX_DEPTH = 100  # of values in values; a published network has some 20
ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"
_BROKEN = (  # what zipfile raises, then what values that make no sense do
    zipfile.BadZipFile,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
)

_NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b"}  # numpy -> struct
_NUMBERS |= {"u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?"}
_LOAD_FROM_BYTES = Global("torch.storage", "_load_from_bytes")


@dataclass(frozen=True)
class PersistentObject:
    """An object of a class that is not here: its name, and what the object held. The stored source is not looked at."""

    class_name: str
    state: dict[str, Any]


class Contents(NamedTuple):
    """What a file holds at the top: the names of all entries, and the entries that were asked for."""

    names: tuple[str, ...]
    entries: dict[str, Any]


class _Values:
    """Plain values from the records of one file."""

    def __init__(self, name: str, storages: ZipStorages | None = None) -> None:
        self.name, self._storages = name, storages
        self._nested: dict[int, Storage] = {}  # by id of the record: those that lie inside of the pickle
        self._done: dict[int, tuple[Any, Any]] = {}  # what is stored once is turned once, however often it is used
        self._open: set[int] = set()

    def plain(self, value: Any) -> Any:
        """A stored value without records. Raises ValueError for what no checkpoint holds."""
        if isinstance(value, Global):
            raise ValueError(f"{value} stands for itself")
        if not isinstance(value, list | tuple | dict | Record | Reference):
            return value
        key = id(value)
        if key in self._done:
            return self._done[key][1]
        if key in self._open or len(self._open) >= MAX_DEPTH:
            raise ValueError("values are nested without end")
        self._open.add(key)
        result = self._plain(value)
        self._open.discard(key)
        self._done[key] = value, result  # the value too: while it lives, no other has its id
        return result

    def _plain(self, value: list[Any] | tuple[Any, ...] | dict[Any, Any] | Record | Reference) -> Any:
        if isinstance(value, Reference):
            if self._storages is None:
                raise ValueError("tensors outside of a file that has no outside")
            return self._storages.read(value.id)
        if isinstance(value, Record):
            return _MEANINGS[value.function](self, value)
        if isinstance(value, dict):
            return {key: self.plain(item) for key, item in value.items()}
        return type(value)(self.plain(item) for item in value)

    def read_nested(self, record: Record) -> None:
        """Take in the storage that `record` holds as the bytes of an old torch.save."""
        (content,) = record.arguments
        content = self.plain(content)
        if not isinstance(content, bytes):
            raise ValueError("a storage of no bytes")
        self._nested[id(record)] = nested_storage(content, self.name)

    # ---- what the globals mean ----

    def nested(self, record: Record) -> Tensor:
        """A storage inside of the pickle, 1-D."""
        return self._nested[id(record)].read()

    def mapping(self, record: Record) -> dict[Any, Any]:
        """OrderedDict, EasyDict."""
        _arguments(record)
        return {key: self.plain(value) for key, value in record.items.items()}

    def members(self, record: Record) -> set[Any]:
        """A set of strings and numbers, as protocol 2 writes it."""
        (items,) = _arguments(record, list)
        if not all(isinstance(item, str | int | float) for item in items):
            raise ValueError("a set of something other than text and numbers")
        return set(items)

    def encoded(self, record: Record) -> bytes:
        """Bytes, as protocol 2 writes them."""
        text, encoding = _arguments(record, str, str)
        if encoding != "latin1":
            raise ValueError("bytes in another encoding than latin1")
        return text.encode("latin1")

    def number(self, record: Record) -> float | int | bool:
        """A numpy scalar -> a Python number."""
        dtype, content = _arguments(record, Record, object)
        content = self.plain(content)
        if dtype.function != Global("numpy", "dtype") or not isinstance(dtype.state, tuple) or len(dtype.state) < 2:
            raise ValueError("a numpy number of no dtype")
        code, order = dtype.arguments[0], dtype.state[1]
        if not (isinstance(code, str) and code in _NUMBERS and order in ("<", ">", "|", "=")):
            raise ValueError("a numpy value that is no number")
        if not isinstance(content, bytes) or len(content) != int(code[1]):
            raise ValueError("a numpy number of another size than it says")
        (number,) = struct.unpack((">" if order == ">" else "<") + _NUMBERS[code], content)
        return number

    def tensor(self, record: Record) -> Tensor:
        """A view of a storage; it must lie within."""
        if not 6 <= len(record.arguments) <= 7:
            raise ValueError("a tensor of other parts than torch writes")
        storage, offset, size, stride = map(self.plain, record.arguments[:4])
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Tensor) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise ValueError("a tensor of other parts than torch writes")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count > storage.numel() or (count and last >= storage.numel()):
            raise ValueError("a tensor that is larger than its storage")
        return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)

    def parameter(self, record: Record) -> Tensor:
        """A parameter -> its tensor."""
        tensor = self.plain(record.arguments[0])
        if not isinstance(tensor, Tensor):
            raise ValueError("a parameter that is no tensor")
        return tensor

    def container(self, record: Record) -> PersistentObject:
        """A container of torch's own."""
        return self._object(record.function.name, record.state)

    def persistent(self, record: Record) -> PersistentObject:
        """An object whose class the file would bring along as source."""
        (meta,) = _arguments(record, dict)
        return self._object(meta.get("class_name"), meta.get("state"))

    def _object(self, class_name: Any, state: Any) -> PersistentObject:
        if not (isinstance(class_name, str) and isinstance(state, dict)):
            raise ValueError("an object without a class name or state")
        return PersistentObject(class_name, self.plain(state))


def _arguments(record: Record, *kinds: type) -> tuple[Any, ...]:
    """The arguments of a record, which must be of these kinds."""
    arguments = record.arguments
    if len(arguments) != len(kinds) or not all(map(isinstance, arguments, kinds)):
        raise ValueError(f"{record.function} has other arguments than it takes")
    return arguments


_MEANINGS: dict[Global, Callable[[_Values, Record], Any]] = {
    Global("collections", "OrderedDict"): _Values.mapping,
    Global("dnnlib.util", "EasyDict"): _Values.mapping,
    Global("builtins", "set"): _Values.members,
    Global("__builtin__", "set"): _Values.members,
    Global("_codecs", "encode"): _Values.encoded,
    Global("numpy.core.multiarray", "scalar"): _Values.number,
    Global("numpy._core.multiarray", "scalar"): _Values.number,
    _LOAD_FROM_BYTES: _Values.nested,
    Global("torch._utils", "_rebuild_tensor_v2"): _Values.tensor,
    Global("torch._utils", "_rebuild_parameter"): _Values.parameter,
    Global("torch.nn.modules.container", "ModuleDict"): _Values.container,
    Global("torch.nn.modules.container", "ModuleList"): _Values.container,
    Global("torch.nn.modules.container", "Sequential"): _Values.container,
    Global("torch_utils.persistence", "_reconstruct_persistent_obj"): _Values.persistent,
}
ALLOWED = frozenset({*_MEANINGS, *STORAGES, Global("numpy", "dtype")})


def read_contents(path: Path, wanted: Collection[str]) -> Contents:
    """The dictionary that a .pkl or .pt file holds: its names, and the plain values of the `wanted` ones.

    Tensors of entries that are not wanted are not read. Raises UserError that names the file, for one that cannot be
    used, and the first global in it that has no place in a checkpoint.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the .pkl or .pt file itself")
    try:
        with path.open("rb") as file:
            return _read(file, path, wanted)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the .pkl or .pt file of a published checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except _BROKEN as error:
        detail = ascii(str(error))[1:-1][:120]
        raise UserError(f"{path} is damaged or no checkpoint ({detail}): fetch it again") from None


def _read(file: IO[bytes], path: Path, wanted: Collection[str]) -> Contents:
    start = file.read(4)
    if not start:
        raise UserError(f"{path} is empty: fetch it again")
    if start != ZIP_START and start[:1] != PICKLE_START:
        raise UserError(f"{path} is no checkpoint: it is neither a pickle (.pkl) nor a torch.save file (.pt)")
    file.seek(0)
    with ExitStack() as opened:
        if start == ZIP_START:
            archive = opened.enter_context(zipfile.ZipFile(file))
            pickles = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(pickles) != 1:
                raise ValueError("a zip without the data.pkl of torch.save")
            folder = pickles[0].rpartition("/")[0]
            order = f"{folder}/byteorder"  # older files have none
            if order in archive.namelist() and read_member(archive, order) != b"little":
                raise ValueError("written on a big-endian machine")
            values = _Values(str(path), ZipStorages(archive, folder))
            content = read_records(BytesIO(read_member(archive, pickles[0])), ALLOWED, str(path))
        else:
            values = _Values(str(path))
            mapped = opened.enter_context(mmap(file.fileno(), 0, access=ACCESS_READ))  # never reads past the end
            content = read_records(cast(IO[bytes], mapped), ALLOWED, str(path))
        for record in content.records:
            if record.function == _LOAD_FROM_BYTES:
                values.read_nested(record)  # all of them, so that a global in one is refused before anything else
        return _top(content, values, path, wanted)


def _top(content: Pickle, values: _Values, path: Path, wanted: Collection[str]) -> Contents:
    top = content.value
    if isinstance(top, Record) and _MEANINGS.get(top.function) is _Values.mapping:
        top = top.items
    if not isinstance(top, dict):
        raise UserError(f"{path} holds a single object, not the dictionary of a published checkpoint")
    return Contents(tuple(map(str, top)), {name: values.plain(top[name]) for name in wanted if name in top})
