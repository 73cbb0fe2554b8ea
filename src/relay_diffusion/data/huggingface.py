"""Images in parquet and arrow files, read by Hugging Face's library datasets.

The library converts parquet to Arrow files in its cache, once, and maps these into memory: rows have random access.
It runs no code of a data set. Only bytes in the image column are decoded, never the paths or URLs beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from relay_diffusion.data.bounded_io import check_size, files_below
from relay_diffusion.data.sources import Source, SourceFormat, existing_path
from relay_diffusion.errors import UserError
from relay_diffusion.utils.messages import first_names, one_line, shorten

SUFFIXES = (".parquet", ".arrow")
SAVED = ("dataset_dict.json", "state.json")  # of Dataset.save_to_disk
HUB = re.compile(r"hf://((?:\w[\w.-]*/)?\w[\w.-]*)(?:@(.+))?", re.ASCII)
INSTALL = 'pip install "relay-diffusion[datasets]"'
OPTION = "data.dataset.format"
ROWS = 64  # converted at once: a dictionary in a small parquet file may expand to much memory


@dataclass(frozen=True)
class HuggingFaceFormat(SourceFormat):
    """Parquet or arrow files: one, a folder, a folder of `save_to_disk`, or a dataset on the Hub.

    image_column: encoded images. label_column: class indices, or null. caption_column: texts or lists of texts, or
    null. split: the part to read; a `subset` takes its place. config: which configuration, if there are several.
    """

    image_column: str = "image"
    label_column: str | None = None
    caption_column: str | None = None
    split: str = "train"
    config: str | None = None

    def open(self, path: str | Path, option: str, subset: str = "") -> Source:
        """Open a split; on the first call its parquet files are converted, or downloaded.

        Raises UserError, also without the library.
        """
        if find_spec("datasets") is None:
            raise UserError(f"{option}={path}: needs the library datasets: {INSTALL}")
        where, split = f"{option}={path}", subset.strip("/") or self.split
        if address := HUB.fullmatch(str(path)):
            with _explained(where):
                rows = _on_hub(address[1], address[2], self.config, split, where)
            return RowSource(str(path), option, rows, split, self)
        place = existing_path(path, option)
        with _explained(where):
            saved = place.is_dir() and any((place / name).is_file() for name in SAVED)
            rows = _saved(place, split, where) if saved else _local(place.resolve(), self.config, split, where)
        return RowSource(place, option, rows, split, self)


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
        """Read the class indices, and the names of a ClassLabel; None without any."""
        column = self._format.label_column
        if column is None:
            return None, None
        return self._column(column) or None, getattr(self._features[column], "names", None)

    def caption_entries(self) -> object:
        """Read the captions; None without any."""
        return None if self._format.caption_column is None else self._column(self._format.caption_column)

    def _column(self, name: str) -> list[tuple[str, Any]]:
        """Read a column without its missing values, by the names of the rows."""
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
    splits[split].data.validate(full=True)  # offsets of a damaged Arrow file may point outside of its memory
    return splits[split]


def _local(path: Path, config: str | None, split: str, where: str) -> Any:
    """Open a split of parquet or arrow files, which are copied to the cache."""
    from datasets import load_dataset_builder

    files = [path] if path.is_file() else [path / name for name in files_below(path)]
    tables = sorted(file for file in files if file.suffix in SUFFIXES)
    if not tables:
        raise UserError(f"{where}: holds no {' or '.join(SUFFIXES)} file; use data=folder for image files")
    for file in tables:
        if file.suffix == ".arrow":
            _validate(file)
    if path.is_file():
        if config is not None:
            raise UserError(f"{OPTION}.config={config}: {where} is a file, which has no configurations; remove it")
        builder = load_dataset_builder(path.suffix[1:], data_files={"train": [str(path)]})
    else:
        builder = load_dataset_builder(str(path), name=config)
    return _built(builder, split, where, set(map(str, tables)))


def _on_hub(name: str, revision: str | None, config: str | None, split: str, where: str) -> Any:
    """Open a split of a dataset on the Hub, which is downloaded once."""
    from datasets import load_dataset_builder

    return _built(load_dataset_builder(name, name=config, revision=revision), split, where, None)


def _built(builder: Any, split: str, where: str, tables: Collection[str] | None) -> Any:
    """Convert the files of a builder, and open a split.

    tables: the files that it may read; None: parquet files of its own repository. Only the names of files decide which
    builder the library chooses, and some builders unpickle.
    """
    splits = builder.config.data_files or {}
    home = f"hf://datasets/{builder.repo_id}@"
    for file in (str(file) for files in splits.values() for file in files):
        own = file.startswith(home) and file.endswith(".parquet") if tables is None else file in tables
        if not own:
            raise UserError(
                f"{where}: would read {shorten(file)}; only its own {' and '.join(SUFFIXES)} files are read"
            )
    if splits:  # empty in offline mode
        _check_split(split, splits, where)
    if not Path(builder.cache_dir).is_dir():
        rank_zero_only(print)(f"note: {where}: copied once to {builder.cache_dir}", flush=True)
    if hasattr(builder.config, "batch_size"):
        builder.config.batch_size = ROWS
    builder.download_and_prepare()
    _check_split(split, builder.info.splits, where)
    return builder.as_dataset(split=split)


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
    """Silence the library in this block, and turn its errors into UserErrors of one line."""
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
