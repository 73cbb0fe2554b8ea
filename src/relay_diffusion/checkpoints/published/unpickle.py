"""Read EDM pickles and `torch.save` files without running code in them.

A `pickle.Unpickler` that imports nothing: the globals of published checkpoints become the inert stand-ins of
`_STAND_INS`, all others raise an error. The opcodes are scanned first, because the unpickler itself allocates any size
that a small file requests, looks up extension codes without `find_class`, and takes exponential time to hash nested
tuples.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BytesIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from relay_diffusion.errors import UserError

MAX_OPCODES = 5_000_000  # a published checkpoint has fewer than a million
MAX_ELEMENTS = 2**48  # elements of a storage
ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
    "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES",
    "BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET",
    "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
))  # fmt: skip
_BROKEN = (  # errors of pickle and zipfile, then of values of the wrong type
    pickle.UnpicklingError,
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
_NUMBERS = {  # numpy code -> struct code
    **{"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b"},
    **{"u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?"},
}


class _UnknownGlobalError(Exception):
    """Global that checkpoints do not use."""


# ---- stand-ins for the globals of a checkpoint; all have __setstate__, so BUILD sets no attribute ----


class _Function:
    """Function that only REDUCE can call."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state of a function")


class _Mapping(dict[Any, Any]):
    """OrderedDict or EasyDict, without attributes."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes, such as the `_metadata` of a state dict."""


class StoredObject:
    """Object of a foreign class: the class name and the state, never the source."""

    def __init__(self, class_name: str, state: Mapping[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("an object without a state")
        self.state = state


def _container(class_name: str) -> type[StoredObject]:
    """Stand-in for a torch container, which pickles construct without `__init__`."""
    return type(class_name, (StoredObject,), {"class_name": class_name})


def _persistent(meta: Any) -> StoredObject:
    """Build an object of EDM's torch_utils.persistence, whose class is stored as source."""
    class_name, state = meta.get("class_name"), meta.get("state")
    if not (isinstance(class_name, str) and isinstance(state, dict)):
        raise ValueError("an object without a class name or state")
    return StoredObject(class_name, state)


class _DType:
    """Stand-in for numpy.dtype: code and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, None

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _number(dtype: Any, content: Any) -> float | int | bool:
    """Convert a numpy scalar to a Python number."""
    if not isinstance(dtype, _DType) or dtype.order not in ("<", ">", "|", "="):
        raise ValueError("a numpy scalar without a dtype")
    if dtype.code not in _NUMBERS or not isinstance(content, bytes) or len(content) != int(dtype.code[1]):
        raise ValueError("a numpy scalar that is no number, or of another size than its dtype")
    (number,) = struct.unpack((">" if dtype.order == ">" else "<") + _NUMBERS[dtype.code], content)
    return cast(float, number)


def _set(items: Any) -> set[Any]:
    """Build a set, as protocol 2 writes it."""
    if not isinstance(items, list) or not all(isinstance(item, str | int | float) for item in items):
        raise ValueError("a set of something other than text and numbers")
    return set(items)


def _encode(text: Any, encoding: Any) -> bytes:
    """Encode bytes, as protocol 2 writes them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in another encoding than latin1")
    return text.encode("latin1")


class _StorageType:
    """Class of a storage, which occurs in persistent ids only."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state of a storage class")


class Storage:
    """Elements of tensors, read on first use."""

    def __init__(self, dtype: torch.dtype, count: int, content: Callable[[], bytes | memoryview]) -> None:
        self.dtype, self.count, self._content = dtype, count, content
        self._tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state of a storage")

    def read(self) -> Tensor:
        """Return the elements as a 1-D tensor that owns its memory."""
        if self._tensor is None:
            content = self._content()
            empty = torch.empty(0, dtype=self.dtype)  # frombuffer cannot make an empty tensor
            self._tensor = torch.frombuffer(bytearray(content), dtype=self.dtype) if content else empty
        return self._tensor


class StoredTensor:
    """View of a storage, within its bounds. `read()` returns the tensor."""

    __slots__ = ("_layout", "_storage")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < MAX_ELEMENTS for n in numbers):
            raise ValueError("a tensor of other parts than torch writes")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = math.prod(size)
        if count > storage.count or (count and last >= storage.count):
            raise ValueError("a tensor that is larger than its storage")
        self._storage, self._layout = storage, (tuple(size), tuple(stride), offset)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state of a tensor")

    def read(self) -> Tensor:
        """Return the tensor on the CPU. Raises ValueError or KeyError if elements are missing."""
        size, stride, offset = self._layout
        numbers = self._storage.read()
        return numbers.as_strided(size, stride, offset) if math.prod(size) else numbers.new_empty(size)


def _parameter(tensor: Any, *_: Any) -> StoredTensor:
    """Stand-in for a parameter: its tensor."""
    if not isinstance(tensor, StoredTensor):
        raise ValueError("a parameter that is no tensor")
    return tensor


def _nested_storage(content: Any) -> Storage:
    """Read a storage in a pickle, as old torch.save wrote it.

    Five pickles, the number of elements, the elements.
    """
    if not isinstance(content, bytes):
        raise ValueError("a storage of no bytes")
    file = BytesIO(content)
    magic, protocol, system, stored, keys = (_load(file, _STORAGE_TYPES, lambda *found: found) for _ in range(5))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(stored, tuple):
        raise ValueError("a storage in an unknown format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("a storage of a big-endian machine")
    dtype, key, count = stored
    if keys != [key] or file.read(8) != count.to_bytes(8, "little"):
        raise ValueError("a storage of another size than its header")
    numbers = memoryview(content)[file.tell() :][: count * dtype.itemsize]
    if len(numbers) != count * dtype.itemsize:
        raise ValueError("a storage that ends early")
    return Storage(dtype, count, lambda: numbers)


_STORAGE_TYPES: dict[tuple[str, str], Any] = {
    ("torch", f"{name}Storage"): _StorageType(dtype)
    for name, dtype in {
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Double": torch.float64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_STAND_INS: dict[tuple[str, str], Any] = _STORAGE_TYPES | {
    ("collections", "OrderedDict"): _Mapping,
    ("dnnlib.util", "EasyDict"): _Mapping,
    ("builtins", "set"): _Function(_set),
    ("__builtin__", "set"): _Function(_set),
    ("_codecs", "encode"): _Function(_encode),
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "scalar"): _Function(_number),
    ("numpy._core.multiarray", "scalar"): _Function(_number),
    ("torch.storage", "_load_from_bytes"): _Function(_nested_storage),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(StoredTensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch.nn.modules.container", "ModuleDict"): _container("ModuleDict"),
    ("torch.nn.modules.container", "ModuleList"): _container("ModuleList"),
    ("torch.nn.modules.container", "Sequential"): _container("Sequential"),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Function(_persistent),
}


# ---- the unpickler ----


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, file: IO[bytes], known: Mapping[tuple[str, str], Any], storage: Callable[[torch.dtype, str, int], Any]
    ) -> None:
        super().__init__(file)
        self._known, self._storage = known, storage

    def find_class(self, module: str, name: str) -> Any:
        return _stand_in(self._known, module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage of an id ('storage', class, key, device, count[, None])."""
        if isinstance(pid, tuple) and (len(pid) == 5 or (len(pid) == 6 and pid[5] is None)):
            word, kind, key, _, count = pid[:5]
            valid = isinstance(key, str) and type(count) is int and 0 <= count < MAX_ELEMENTS
            if word == "storage" and isinstance(kind, _StorageType) and valid:
                return self._storage(kind.dtype, key, count)
        raise ValueError("a persistent id that torch does not write")


def _stand_in(known: Mapping[tuple[str, str], Any], module: str, name: str) -> Any:
    if (module, name) not in known:
        raise _UnknownGlobalError(ascii(f"{module}.{name}")[1:-1][:100])  # ascii: the name may hold any character
    return known[module, name]


def _load(
    file: IO[bytes], known: Mapping[tuple[str, str], Any], storage: Callable[[torch.dtype, str, int], Any]
) -> Any:
    """Read the next pickle of a file."""
    start = file.tell()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pickletools warns of odd escapes in damaged files
        _scan(file, known)
    file.seek(start)
    return _Unpickler(file, known, storage).load()


def _scan(file: IO[bytes], known: Mapping[tuple[str, str], Any]) -> None:
    """Reject opcodes that checkpoints do not use or that exhaust resources.

    Resources: time or memory beyond the size of the file. Follows the stack as far as needed to detect tuples that are
    used as keys.
    """
    stack: list[Any] = []  # type of each value, as pickletools names it
    memo: dict[int, Any] = {}
    frame_end: int | None = None
    for count, (opcode, argument, position) in enumerate(
        cast(Iterator[tuple[Any, Any, int]], pickletools.genops(file))
    ):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            _stand_in(known, *argument.split(" ", 1))  # prefer the message that names the global
        if name not in OPCODES or count >= MAX_OPCODES:
            raise ValueError(f"opcode {name} is not used by checkpoints, or follows {MAX_OPCODES:,} others")
        if frame_end is not None and position >= frame_end:
            if position > frame_end:  # the unpickler would skip bytes beyond the frame
                raise ValueError("an opcode crosses the end of a frame")
            frame_end = None
        if name == "FRAME":
            if frame_end is not None:
                raise ValueError("a frame inside a frame")
            frame_end = position + 9 + argument
        elif name == "STOP" and frame_end not in (None, position + 1):
            raise ValueError("a frame that does not end with the pickle")
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if argument is None else argument
            if index > count:  # the unpickler would allocate memory for all indices below
                raise ValueError("a memo index larger than the pickle")
            memo[index] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            _step(opcode, stack)


def _step(opcode: pickletools.OpcodeInfo, stack: list[Any]) -> None:
    """Follow an opcode on a stack of kinds."""
    before, items = opcode.stack_before, []
    if pickletools.stackslice in before:
        start = len(stack) - 1
        while stack[start] is not pickletools.markobject:  # IndexError without a mark
            start -= 1
        items, stack[start:] = stack[start + 1 :], []
        before = before[: before.index(pickletools.markobject)]
    if len(stack) < len(before):
        raise ValueError("an opcode without operands")
    keys = {"SETITEM": stack[-2:-1], "SETITEMS": items[::2], "ADDITEMS": items}.get(opcode.name, [])
    if pickletools.pytuple in keys:
        raise ValueError("a key other than text or a number")
    del stack[len(stack) - len(before) :]
    stack.extend(opcode.stack_after)


# ---- files ----


@contextmanager
def open_checkpoint(path: Path) -> Iterator[dict[Any, Any]]:
    """Yield the dictionary in a .pkl or .pt file.

    Its StoredTensors can be read inside the block. Raises UserError naming the file if it is damaged, also if the body
    of the block detects that, and naming the first global that checkpoints do not use.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the .pkl or .pt file itself")
    try:
        with path.open("rb") as file, ExitStack() as opened:
            content = _read(file, path, opened)
            if not isinstance(content, dict):
                raise UserError(f"{path} holds a single object: give a published checkpoint, which holds a dictionary")
            yield content
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the .pkl or .pt file of a published checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
    except _UnknownGlobalError as error:
        raise UserError(
            f"{path} names {error}, which checkpoints do not use: fetch a published checkpoint; no code in it ran"
        ) from None
    except UserError:
        raise
    except _BROKEN as error:
        detail = ascii(str(error))[1:-1][:120]
        raise UserError(f"{path} is damaged or no checkpoint ({detail}): fetch it again") from None


def _read(file: IO[bytes], path: Path, opened: ExitStack) -> Any:
    start = file.read(4)
    if not start:
        raise UserError(f"{path} is empty: fetch it again")
    if start != ZIP_START and start[:1] != PICKLE_START:
        raise UserError(f"{path} is neither a pickle (.pkl) nor a torch.save file (.pt): give a published checkpoint")
    file.seek(0)
    if start != ZIP_START:
        mapped = opened.enter_context(mmap(file.fileno(), 0, access=ACCESS_READ))  # mmap never reads past the end
        return _load(cast(IO[bytes], mapped), _STAND_INS, _no_storage)
    archive = opened.enter_context(zipfile.ZipFile(file))
    pickles = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError("a zip without the data.pkl of torch.save")
    folder = pickles[0].rpartition("/")[0]
    order = f"{folder}/byteorder"  # older files have no such member
    if order in archive.namelist() and _read_member(archive, order) != b"little":
        raise ValueError("written on a big-endian machine")
    storages: dict[tuple[torch.dtype, str, int], Storage] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        read = partial(_read_member, archive, f"{folder}/data/{key}", count * dtype.itemsize)
        return storages.setdefault((dtype, key, count), Storage(dtype, count, read))

    return _load(BytesIO(_read_member(archive, pickles[0])), _STAND_INS, storage)


def _no_storage(*_: Any) -> Storage:
    raise ValueError("tensors outside of a file that has no outside")


def _read_member(archive: zipfile.ZipFile, name: str, size: int | None = None) -> bytes:
    """Read a member of a torch.save zip.

    Raises ValueError unless it has `size` bytes, uncompressed: compressed data could expand without limit.
    """
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or (size is not None and member.file_size != size):
        raise ValueError(f"{name} is compressed, or of another size than the pickle gives")
    content = archive.read(member)
    if len(content) != member.file_size:
        raise ValueError(f"{name} ends early")
    return content
