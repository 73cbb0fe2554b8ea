"""Small synthetic image files for the tests of `relay_diffusion.data`."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(seed: int, side: int = 8) -> np.ndarray:
    """Random uint8 [side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(stream, kind, **options)
    return stream.getvalue()


def pngs(names: Iterable[str], side: int = 8) -> dict[str, bytes]:
    """One random PNG per name; the picture depends on the position of the name."""
    return {name: encoded(pixels(seed, side)) for seed, name in enumerate(names)}


def write_zip(path: Path, files: Mapping[str, bytes], dataset: object = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        if dataset is not None:
            archive.writestr("dataset.json", dataset if isinstance(dataset, str) else json.dumps(dataset))
    return path


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path
