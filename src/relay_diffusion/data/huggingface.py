"""Images in parquet and arrow files, read by Hugging Face's library datasets.

The library converts parquet to Arrow files in its cache, once, and maps these into memory: rows have random access.
It runs no code of a data set. Only bytes in the image column are decoded, never the paths or URLs beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lightning.fabric.utilities.rank_zero import rank_zero_only

from relay_diffusion.data.bounded_io import MAX_MEMBER, check_size, files_below
from relay_diffusion.data.sources import Source, SourceFormat, existing_path
from relay_diffusion.errors import UserError
from relay_diffusion.utils.installed import require_library
from relay_diffusion.utils.messages import first_names, one_line, shorten

SUFFIXES = (".parquet", ".arrow")
SAVED = ("dataset_dict.json", "state.json")  # of Dataset.save_to_disk
FORM = "hf://USER/NAME[@REVISION][/FOLDER]"
HUB = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)(?:@([^/@]+))?(?:/([\w./ =-]+))?", re.ASCII)
OPTION = "data.dataset.format"
ROWS = 64  # decoded at once to measure a file
MAX_GROUP = 2**32  # bytes of a row group, which the library decodes at once
MAX_RATIO = 100  # decoded bytes of a file over its size; images hardly shrink


@dataclass(frozen=True)
class HuggingFaceFormat(SourceFormat):
    """Parquet or arrow files: one, a folder, or parquet files on the Hub.

    A folder may be one of `save_to_disk`.
    image_column: encoded images. label_column: class indices, or null. caption_column: texts or lists of texts, or
    null. split: the part to read; a `subset` takes its place. config: which configuration, if there are several.
    """

    image_column: str = "image"
    label_column: str | None = None
    caption_column: str | None = None
    split: str = "train"
    config: str | None = None

    def open(self, path: str | Path, option: str, subset: str = "") -> Source:
        """Open a split.

        At first its files are downloaded and converted. Raises UserError, also without the library.
        """
        where, split = f"{option}={path}", subset.strip("/") or self.split
        require_library(f"{where}:", "datasets", "datasets")
        on_hub = str(path).startswith("hf://")
        local = None if on_hub else existing_path(path, option)
        with _explained(where):
            place = local or _downloaded(str(path), where)
            place = place.resolve() if place.is_dir() else place.absolute()  # as the library does
            saved = place.is_dir() and any((place / name).is_file() for name in SAVED)
            rows = _saved(place, split, where) if saved else _converted(place, self.config, split, where)
        return RowSource(str(path) if on_hub else Path(path), option, rows, split, self)


class RowSource(Source):
    """Images in the rows of one split, named SPLIT[ROW].

    rows: a Dataset of the library. Forked and spawned workers and threads can read. Raises UserError that names the
    option of a missing or unsuitable column, and lists the columns.
    """

    kind = "huggingface"
    convertible = False

    def __init__(self, path: Path | str, option: str, rows: Any, split: str, format: HuggingFaceFormat) -> None:
        self._split, self._format = split, format
        self._features, self._schema = rows.features, rows.features.arrow_schema
        self._rows = rows.with_format("arrow")
        where = f"{option}={path}"
        self._check("image_column", format.image_column, _is_encoded, "encoded images", where)
        self._check("label_column", format.label_column, _is_index, "class indices", where)
        self._check("caption_column", format.caption_column, _is_text, "texts", where)
        self.described_in = " and ".join(f"column {name!r}" for name in self._described())
        self.no_captions = f"has no captions; use text=none, or {OPTION}.caption_column={' or '.join(self._others())}"
        super().__init__(path, option, (f"{split}[{row}]" for row in range(len(rows))))

    def _check(self, name: str, column: str | None, fits: Callable[[Any], bool], content: str, where: str) -> None:
        if column is None:
            return
        columns = self._schema.names
        if column not in columns:
            raise UserError(f"{OPTION}.{name}={column}: {where} has no such column; its columns: {', '.join(columns)}")
        if not fits(kind := self._schema.field(column).type):
            raise UserError(f"{OPTION}.{name}={column}: the column holds {kind}, not {content}; use another column")

    def _described(self) -> list[str]:
        return [name for name in (self._format.label_column, self._format.caption_column) if name is not None]

    def _others(self) -> list[str]:
        return [name for name in self._schema.names if name not in (self._format.image_column, *self._described())]

    def _is_image(self, name: str) -> bool:  # noqa: ARG002
        return True

    def names_in(self, subset: str) -> list[str]:  # noqa: ARG002
        """Return the names of all rows; the subset is the split."""
        return self.names

    def ignored_note(self, subset: str = "") -> str:  # noqa: ARG002
        """List the columns that are not read."""
        others = self._others()
        return f"column{'s' * (len(others) > 1)} {first_names(others)}" if others else ""

    def label_entries(self) -> tuple[object, object]:
        """Read the class indices, and the class names of a ClassLabel."""
        column = self._format.label_column
        if column is None:
            return None, None
        return self._column(column) or None, getattr(self._features[column], "names", None)

    def caption_entries(self) -> object:
        """Read the captions; None without any."""
        return None if self._format.caption_column is None else self._column(self._format.caption_column)

    def _column(self, name: str) -> list[tuple[str, Any]]:
        """Read a column by row, without missing values."""
        values = self._rows.select_columns([name])[:].column(name)
        try:
            check_size(values.nbytes)
        except ValueError as error:
            raise UserError(f"{self.option}={self.path}: column {name!r}: {error}; use a smaller split") from None
        return [(row, value) for row, value in zip(self.names, values.to_pylist(), strict=True) if value is not None]

    def _read(self, member: str) -> bytes:
        row = int(member.removeprefix(self._split)[1:-1])
        value = self._rows[row].column(self._format.image_column)[0]
        if value.is_valid and hasattr(value, "keys"):  # a struct of bytes and path
            value = value["bytes"]
        if not value.is_valid:
            raise ValueError("the row holds no bytes, and a path or URL is not followed")
        content = value.as_buffer()
        check_size(content.size)
        return bytes(content.to_pybytes())


def _is_encoded(kind: Any) -> bool:
    from pyarrow import types

    inner = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    return bool(types.is_binary(inner) or types.is_large_binary(inner))


def _is_index(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    return bool(types.is_string(inner) or types.is_large_string(inner))


def _saved(folder: Path, split: str, where: str) -> Any:
    """Open a split of a folder of `save_to_disk`."""
    from datasets import load_from_disk

    saved = load_from_disk(str(folder))
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    _check_split(split, splits, where)
    rows = splits[split]
    for file in (str(entry["filename"]) for entry in rows.cache_files):
        if not Path(normpath(file)).is_relative_to(folder):
            raise UserError(f"{where}: would read {shorten(file)}, which is not in it")
    rows.data.validate(full=True)  # offsets of a damaged Arrow file may point outside of its memory
    return rows


def _downloaded(address: str, where: str) -> Path:
    """Download the parquet files of a dataset on the Hub, once."""
    from huggingface_hub import snapshot_download

    match = HUB.fullmatch(address)
    folder = "" if match is None else (match[3] or "").strip("/")
    if match is None or ".." in folder.split("/"):
        raise UserError(f"{where}: is not an address on the Hub; write {FORM}")
    revision = unquote(match[2]) if match[2] else None
    inside = f"{folder}/" if folder else ""
    wanted = [f"{inside}{name}" for name in ("*.parquet", "README.md")]
    snapshot = snapshot_download(match[1], repo_type="dataset", revision=revision, allow_patterns=wanted)
    if not any((Path(snapshot) / folder).rglob("*.parquet")):
        converted = f"hf://{match[1]}@refs%2Fconvert%2Fparquet"
        raise UserError(f"{where}: holds no parquet file; the Hub converts some data sets, then use {converted}")
    return Path(snapshot) / folder


def _converted(path: Path, config: str | None, split: str, where: str) -> Any:
    """Open a split of parquet or arrow files.

    The library copies them to its cache.
    """
    from datasets import load_dataset_builder

    files = [path] if path.is_file() else [path / name for name in files_below(path)]
    tables = {str(file) for file in files if file.suffix in SUFFIXES}
    if not tables:
        raise UserError(f"{where}: holds no {' or '.join(SUFFIXES)} file; use data=folder for image files")
    splits, features = {"train": [str(path)]}, None
    if path.is_dir():
        listed = load_dataset_builder(str(path), name=config)
        splits, features = listed.config.data_files, listed.info.features
    elif config is not None:
        raise UserError(f"{OPTION}.config={config}: {where} is a file, which has no configurations; remove it")
    _check_split(split, splits, where)
    chosen = list(map(str, splits[split]))
    # a README.md may name files anywhere; the endings decide how the library reads them, and it unpickles some
    for file in chosen:
        if file not in tables:
            raise UserError(f"{where}: would read {shorten(file)}; only {' and '.join(SUFFIXES)} files in it are read")
    kind = Path(chosen[0]).suffix
    builder = load_dataset_builder(kind[1:], data_files={split: chosen}, features=features)
    if not Path(builder.cache_dir).is_dir():
        for table in map(Path, chosen):
            _validate(table) if kind == ".arrow" else _check_expansion(table)
        rank_zero_only(print)(f"note: {where}: copied once to {builder.cache_dir}", flush=True)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _check_expansion(file: Path) -> None:
    """Raise ValueError for a parquet file that expands beyond its limits.

    Repeated values and compression make a file small. It is decoded in small parts here.
    """
    from pyarrow import parquet

    most, total = MAX_RATIO * file.stat().st_size + MAX_MEMBER, 0
    with parquet.ParquetFile(file) as opened:
        for group in range(opened.num_row_groups):
            before = total
            for batch in opened.iter_batches(ROWS, [group]):
                total += batch.nbytes
                if total > most:
                    raise ValueError(f"{file.name!r} expands to more than {MAX_RATIO} times its size")
                if total - before > MAX_GROUP:
                    raise ValueError(
                        f"{file.name!r} has a row group of more than {MAX_GROUP:,} bytes; write smaller ones"
                    )


def _check_split(split: str, splits: Collection[str], where: str) -> None:
    if split not in splits:
        available = ", ".join(map(str, splits))
        raise UserError(f"{OPTION}.split={split}: {where} has no such split; available: {available}")


def _validate(file: Path) -> None:
    """Check the offsets in an Arrow file, which the library trusts. Raises ValueError."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        kind = pyarrow.ipc.open_file if source.read(6) == b"ARROW1" else pyarrow.ipc.open_stream
        source.seek(0)
        with kind(source) as reader:
            reader.read_all().validate(full=True)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Silence the library in this block, and turn its errors into UserErrors."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    try:
        logging.set_verbosity(logging.CRITICAL)
        disable_progress_bars()
        yield
    except UserError:
        raise
    except Exception as error:  # of the library, of Arrow, of the network: many types
        reason = shorten(one_line(error.__cause__ or error), 300)
        raise UserError(f"{where}: cannot be read ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()
