"""Where the numbers of tensors lie: in members of a torch.save zip, or in a pickle as old torch.save's bytes."""

from __future__ import annotations

import zipfile
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from relay_diffusion.checkpoints.published.records import Global, Reference, read_records

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAX_NUMBERS = 2**48

STORAGES = {
    Global("torch", f"{name}Storage"): dtype
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


class Storage:
    """Numbers that are still bytes: `read()` makes a 1-D tensor of them, once."""

    def __init__(self, dtype: torch.dtype, content: bytes | memoryview) -> None:
        self.dtype, self._content = dtype, content
        self._tensor: Tensor | None = None

    def read(self) -> Tensor:
        """The numbers, 1-D, in memory of their own."""
        if self._tensor is None:
            empty = torch.empty(0, dtype=self.dtype)  # frombuffer refuses to make this
            self._tensor = torch.frombuffer(bytearray(self._content), dtype=self.dtype) if self._content else empty
            self._content = b""
        return self._tensor


def storage_id(identity: Any) -> tuple[torch.dtype, str, int]:
    """('storage', its class, key, device, count[, None]) -> dtype, key, count. Where it was does not matter."""
    if isinstance(identity, tuple) and (len(identity) == 5 or (len(identity) == 6 and identity[5] is None)):
        word, kind, key, _, count = identity[:5]
        valid = isinstance(key, str) and type(count) is int and 0 <= count < MAX_NUMBERS
        if word == "storage" and isinstance(kind, Global) and kind in STORAGES and valid:
            return STORAGES[kind], key, count
    raise ValueError("a persistent id that torch does not write")


def read_member(archive: zipfile.ZipFile, name: str, size: int | None = None) -> bytes:
    """A member of a torch.save zip. Raises ValueError if it is not of `size` or compressed, which may grow at will."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or (size is not None and member.file_size != size):
        raise ValueError(f"{name} is compressed, or of another size than the pickle says")
    content = archive.read(member)
    if len(content) != member.file_size:
        raise ValueError(f"{name} ends early")
    return content


class ZipStorages:
    """The storages of a torch.save zip, whose members lie in `folder`. A member is read when it is asked for."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self.archive, self.folder = archive, folder
        self._storages: dict[tuple[torch.dtype, str, int], Storage] = {}

    def read(self, identity: Any) -> Tensor:
        """The storage of a persistent id, 1-D. Raises ValueError or KeyError if its member is not as the id says."""
        wanted = dtype, key, count = storage_id(identity)
        if wanted not in self._storages:
            content = read_member(self.archive, f"{self.folder}/data/{key}", count * dtype.itemsize)
            self._storages[wanted] = Storage(dtype, content)
        return self._storages[wanted].read()


def nested_storage(content: bytes, name: str) -> Storage:
    """A storage as an old torch.save wrote it: five pickles, the count, the numbers.

    `name`: of the file that holds it. Raises UserError for a global that is no storage class, ValueError otherwise.
    """
    file = BytesIO(content)
    magic, protocol, system, stored, keys = (read_records(file, STORAGES, name).value for _ in range(5))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(stored, Reference):
        raise ValueError("a storage in a format that is not known")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("a storage of a big-endian machine")
    dtype, key, count = storage_id(stored.id)
    if keys != [key] or file.read(8) != count.to_bytes(8, "little"):
        raise ValueError("a storage of another size than it says")
    numbers = memoryview(content)[file.tell() :][: count * dtype.itemsize]
    if len(numbers) != count * dtype.itemsize:
        raise ValueError("a storage that ends early")
    return Storage(dtype, numbers)
