"""Captions to convert: text files beside the images, a JSON file, metadata tables."""

from __future__ import annotations

import csv
import json
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

from relay_diffusion.data.bounded_io import file_bytes, utf8_text
from relay_diffusion.data.captions import checked_captions
from relay_diffusion.data.sources import Source, existing_path
from relay_diffusion.errors import UserError
from relay_diffusion.utils.messages import did_you_mean, one_line

METADATA_FILES = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's imagefolder
NAME_COLUMN, TEXT_COLUMN = "file_name", "text"


@dataclass(frozen=True)
class FoundCaptions:
    """Captions by image name.

    unused: names of caption files and entries without an image. files: members of the source that were read.
    """

    by_name: dict[str, list[str]]
    unused: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)


def text_files(source: Source) -> FoundCaptions:
    """Read the file a.txt of each image a.png, one caption per line.

    Raises UserError naming the file if it is not UTF-8 or holds unusable text.
    """
    owners: dict[str, list[str]] = defaultdict(list)
    for name in source.names:
        owners[str(PurePosixPath(name).with_suffix(".txt"))].append(name)
    files = [name for name in source.members if name.lower().endswith(".txt")]
    by_name = {}
    for file, read in source.items([file for file in files if file in owners]):
        where = source.where(file)
        found = checked_captions(utf8_text(read(), where).splitlines(), where)
        by_name.update(dict.fromkeys(owners[file], found))
    return FoundCaptions(by_name, [file for file in files if file not in owners], set(files))


def json_file(source: Source, path: str) -> FoundCaptions:
    """Read a JSON file {image name: caption or [caption, ...]}.

    Names are relative to the source. Raises UserError naming the file and the entry.
    """
    where = f"captions_file={path}"
    content = _json(utf8_text(_read(path), where), where)
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be an object {{image name: caption or list of captions}}")
    return _assigned(source, content.items(), lambda name: f"{where}: {name!r}")


def metadata_tables(source: Source, column: str, path: str | None) -> FoundCaptions:
    """Read the captions in one column of metadata.csv or metadata.jsonl files.

    Each file of the source names images relative to its own folder; a file `path` outside of it relative to the source.
    Several rows of an image are several captions. Raises UserError naming the file and the line.
    """
    if path is not None:
        tables = {"": (f"captions_file={path}", path, _read(path))}
    else:
        files = [name for name in source.members if PurePosixPath(name).name in METADATA_FILES]
        if not files:
            raise UserError(
                f"{source.path} has no {' or '.join(METADATA_FILES)}; captions_file=PATH takes one from elsewhere"
            )
        tables = {file: (source.where(file), file, read()) for file, read in source.items(files)}
    entries: dict[str, list[object]] = defaultdict(list)
    for file, (where, table, content) in tables.items():
        columns: set[str] = set()
        for line, row in _rows(table, utf8_text(content, where), where):
            columns.update(row)
            if not isinstance(row.get(NAME_COLUMN), str):
                raise UserError(f"{where}, line {line}: no text in the column {NAME_COLUMN!r}")
            value = row.get(column)
            some = value if isinstance(value, list) else [] if value is None else [value]
            entries[str(PurePosixPath(file).parent / row[NAME_COLUMN])] += some
        if column not in columns:
            raise UserError(f"captions_column={column}: is no column of {where}{did_you_mean(column, sorted(columns))}")
    found = _assigned(source, entries.items(), repr)
    return FoundCaptions(found.by_name, found.unused, set(tables) if path is None else set())


def _assigned(source: Source, entries: Iterable[tuple[str, object]], where: Callable[[str], str]) -> FoundCaptions:
    """Assign entries to the images of a source.

    Names may begin with './'.
    """
    images, by_name, unused = set(source.names), {}, []
    for key, value in entries:
        name = str(PurePosixPath(key))
        captions = checked_captions(value, where(key))
        if name in images:
            by_name[name] = captions
        else:
            unused.append(name)
    return FoundCaptions(by_name, unused)


def _rows(name: str, text: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (line number, row) of a CSV or JSON Lines table, by its ending."""
    if name.lower().endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = _json(line, f"{where}, line {number}")
                if not isinstance(row, dict):
                    raise UserError(f"{where}, line {number}: {reprlib.repr(row)} must be an object")
                yield number, row
        return
    if not name.lower().endswith(".csv"):
        raise UserError(f"{where}: the name must end in .csv or .jsonl")
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise UserError(f"{where}, line {reader.line_num}: more fields than columns; quote commas in captions")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: {one_line(error)}") from error


def _read(path: str) -> bytes:
    file = existing_path(path, "captions_file")
    try:
        return file_bytes(Path(file))
    except (OSError, ValueError) as error:
        raise UserError(f"captions_file={path}: {one_line(error)}") from error


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not valid JSON ({one_line(error)})") from error
