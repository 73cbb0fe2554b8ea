"""Atomic writes, checksums, and JSON with infinities."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from relay_diffusion.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parents[1] / "conf"  # installed package or source checkout


def temporary_name(path: Path) -> Path:
    """Name a temporary file in the folder of `path`.

    In the same folder a rename replaces `path` atomically.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Delete stale temporary files among `paths`. Call only while no process writes there."""
    for path in paths:
        if re.fullmatch(r"\..+\.[0-9a-f]+\.tmp", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn an OSError of this block into a UserError that names `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}") from None


@contextmanager
def atomic_write(path: Path, what: object = None, synced: bool = True) -> Iterator[IO[bytes]]:
    """Write a file atomically: to a temporary name, synced, then renamed to `path`.

    An error inside the block removes the temporary file. Raises UserError if the folder is not writable or full;
    `what` names the file in the message, by default its path. `synced=False` is faster: the file is complete or absent
    if the process is killed, but a power failure can leave it empty or truncated.
    """
    temporary = temporary_name(path)
    try:
        with writing(path if what is None else what):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                if synced:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder under a temporary name, then rename it to `path`.

    An earlier folder is replaced with all that it holds. An error inside the block leaves it as it was and removes the
    temporary one. Raises UserError if the parent is not writable or full.
    """
    temporary, earlier = temporary_name(path), temporary_name(path)
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                path.replace(earlier)
            temporary.replace(path)
    finally:
        if earlier.exists() and not path.exists():
            earlier.replace(path)
        for left in (temporary, earlier):
            shutil.rmtree(left, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def json_text(content: Any) -> str:
    """Serialize plain values to JSON; infinity and nan become {".float": "inf"}."""
    return json.dumps(_spelled(content), indent=2, allow_nan=False) + "\n"


def parse_json(text: str) -> Any:
    """Parse the output of `json_text`. Raises ValueError for invalid JSON."""
    return json.loads(text, object_hook=lambda node: float(node[".float"]) if node.keys() == {".float"} else node)


def _spelled(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _spelled(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_spelled(value) for value in node]
    return {".float": str(node)} if isinstance(node, float) and not math.isfinite(node) else node


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(path: Path, option: str, overwrite: bool) -> None:
    """Raise UserError if `path` exists, unless `overwrite`."""
    if not overwrite and path.exists():
        raise UserError(f"{option}={path}: exists already; choose another name, or overwrite=true to replace it")
