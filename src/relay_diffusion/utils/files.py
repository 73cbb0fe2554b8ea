"""Files that appear whole or not at all, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from relay_diffusion.errors import UserError


def temporary_name(path: Path) -> Path:
    """Where to write what takes the name `path` once all is written: the same folder, so a rename and no copy."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Delete those of the files that writers left when they were killed; only where nobody writes now."""
    for path in paths:
        if re.fullmatch(r"\..+\.[0-9a-f]+\.tmp", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Raise UserError that names `what` if it cannot be written, or the disk is full."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}") from None


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing; it takes the name `path` once all is written, and goes away otherwise.

    Raises UserError if the place cannot be written to, or is full.
    """
    temporary = temporary_name(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def json_text(content: Any) -> str:
    """JSON of plain values that strict readers accept: infinity, which JSON lacks, is {".float": "inf"}."""
    return json.dumps(_spelled(content), indent=2, allow_nan=False) + "\n"


def parse_json(text: str) -> Any:
    """What `json_text` wrote. Raises ValueError for a text that is no JSON."""
    return json.loads(text, object_hook=lambda node: float(node[".float"]) if node.keys() == {".float"} else node)


def _spelled(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _spelled(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_spelled(value) for value in node]
    return {".float": str(node)} if isinstance(node, float) and not math.isfinite(node) else node


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(path: Path, option: str, overwrite: bool) -> None:
    """Raise UserError if a file is there that would be replaced, unless `overwrite`."""
    if not overwrite and path.exists():
        raise UserError(f"{option}={path}: exists already; choose another name, or overwrite=true to replace it")
