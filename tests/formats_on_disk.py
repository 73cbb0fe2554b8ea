"""Parquet files and tar shards of given images for the tests."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pictures_on_disk import write_tar
from relay_diffusion.data.huggingface import HuggingFaceFormat
from relay_diffusion.data.sources import SourceFormat
from relay_diffusion.data.webdataset import WebDatasetFormat

COLUMNS = HuggingFaceFormat(label_column="label", caption_column="text")


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None] | None = None,
    captions: Sequence[Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write the columns image, label and text; of classes a ClassLabel."""
    from pyarrow import parquet

    parquet.write_table(table(images, labels, captions, classes), path, row_group_size=4)
    return path


def table(
    images: Sequence[bytes | None],
    labels: Sequence[int | None] | None = None,
    captions: Sequence[Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Any:
    import pyarrow
    from datasets import ClassLabel, Features, Image

    columns: dict[str, Any] = {"image": [{"bytes": image, "path": None} for image in images]}
    columns |= {} if labels is None else {"label": labels}
    columns |= {} if captions is None else {"text": captions}
    made = pyarrow.table(columns)
    features = Features.from_arrow_schema(made.schema) | {"image": Image()}
    features |= {"label": ClassLabel(names=list(classes))} if classes else {}
    return made.cast(Features(features).arrow_schema)


def write_shards(
    folder: Path,
    images: Sequence[bytes],
    labels: Sequence[int | None] | None = None,
    captions: Sequence[str] | None = None,
    size: int = 4,
) -> Path:
    """Write shards of `size` samples: 000.png, 000.cls, 000.txt."""
    folder.mkdir(parents=True)
    for first in range(0, len(images), size):
        files: dict[str, bytes] = {}
        for number in range(first, min(first + size, len(images))):
            files[f"{number:03}.png"] = images[number]
            if labels is not None and labels[number] is not None:
                files[f"{number:03}.cls"] = str(labels[number]).encode()
            if captions is not None:
                files[f"{number:03}.txt"] = captions[number].encode()
        write_tar(folder / f"shard-{first // size:03}.tar", files)
    return folder


def other_formats(
    folder: Path, images: Sequence[bytes], labels: Sequence[int], captions: Sequence[str]
) -> Mapping[str, tuple[Path, SourceFormat]]:
    """Write the images in all formats."""
    from datasets import Dataset

    folder.mkdir(parents=True, exist_ok=True)
    parquet = write_parquet(folder / "images.parquet", images, labels, captions)
    saved = folder / "saved"
    if not saved.exists():
        Dataset(table(images, labels, captions)).save_to_disk(str(saved))
    return {
        "parquet": (parquet, COLUMNS),
        "saved": (saved, COLUMNS),
        "shards": (write_shards(folder / "shards", images, labels, captions), WebDatasetFormat()),
    }


def contents(path: Path) -> list[bytes]:
    """Return the images of a zip in the order of their names."""
    with zipfile.ZipFile(path) as archive:
        return [archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".png")]
