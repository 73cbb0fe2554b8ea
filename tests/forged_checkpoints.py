"""Forged pickles and checkpoints for tests."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from support import REFERENCE

EDM = REFERENCE / "edm_snapshot.pkl"
TRAINING_STATE = REFERENCE / "training-state-000025.pt"


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


class Outside:
    """Pickles as a persistent id."""

    def __init__(self, identity: Any) -> None:
        self.identity = identity


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, Outside) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    """`value` with its Calls and Outsides as a pickle."""
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def write_zip(path: Path, content: bytes, **storages: bytes) -> Path:
    """A file as torch.save writes it, from its pickle and its storages by key."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        for key, storage in storages.items():
            archive.writestr(f"archive/data/{key}", storage)
    return path


def text(value: str) -> bytes:
    """A string as pickles of protocol 4 hold it."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def unframed(content: bytes) -> bytes:
    """A pickle without the frames of protocol 4, so that its parts may change their length."""
    frames = [position for opcode, _, position in pickletools.genops(content) if opcode.name == "FRAME"]
    for position in reversed(frames):
        content = content[:position] + content[position + 9 :]
    return content


def rewritten(source: Path, destination: Path, **names: str) -> Path:
    """A copy of a protocol 4 pickle with names in it replaced."""
    content = unframed(source.read_bytes())
    for old, new in names.items():
        assert text(old) in content
        content = content.replace(text(old), text(new))
    destination.write_bytes(content)
    return destination
