"""Time reading batches of uint8 images from a zip, a folder, parquet and tar shards.

python benchmarks/data.py [key=value ...]

The synthetic PNGs have the file size of photographs and are read as in training. Each row is the median of `repeats`
rounds, in which the formats take turns. Images/s of a process are per second of its CPU time, so that other work on
the machine disturbs less. The number of processes is what eight H200 need that train at the speed of one: images/s of
687 (adm_64) and 8,300 (emoji_64) at 64x64, 78 (adm_256) and 1,050 (emoji_256) at 256x256.

  images       number of images                             (256)
  stored       resolution of the PNGs; comma-separated      (256,64)
  resolution   pixels after box averaging; comma-separated  (256,64)
  formats      of zip, folder, parquet, shards              (zip,folder,parquet,shards)
  workers      worker processes of the wall clock rows; comma-separated (1)
  batch        images per batch                             (64)
  batches      batches per round                            (4)
  repeats      rounds                                       (7)
  cached       batches per round from memory                (200)
"""

from __future__ import annotations

import io
import itertools
import math
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image
from timing import environment

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.huggingface import HuggingFaceFormat
from relay_diffusion.data.sources import SourceFormat
from relay_diffusion.data.webdataset import WebDatasetFormat
from relay_diffusion.data.zip_writer import image_zip

GPUS = 8
TRAINED = {64: {"adm_64": 687, "emoji_64": 8300}, 256: {"adm_256": 78, "emoji_256": 1050}}  # images/s on one H200
SHARD = 128  # images


@dataclass
class Options:
    """Options of this command; see above."""

    images: int = 256
    stored: str = "256,64"
    resolution: str = "256,64"
    formats: str = "zip,folder,parquet,shards"
    workers: str = "1"
    batch: int = 64
    batches: int = 4
    repeats: int = 7
    cached: int = 200


def pictures(images: int, side: int) -> list[Image.Image]:
    """Draw smooth images with noise, about 100 KB per 256x256 PNG."""
    generator, drawn = np.random.default_rng(0), []
    for _ in range(images):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.normal(0, 2, smooth.shape).round().astype(np.int16)
        drawn.append(Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)))
    return drawn


def write_zip(path: Path, images: int, side: int) -> dict[str, bytes]:
    """Write the images as a zip; return its PNG files."""
    with image_zip(path) as archive:
        for index, image in enumerate(pictures(images, side)):
            archive.add(f"{index:06d}.png", image)
    source = ImageDataset(path, side)._set._source
    return {name: source.read(name) for name in source.names}


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """Write PNG files."""
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)


def write_parquet(path: Path, files: dict[str, bytes]) -> None:
    """Write one parquet file in row groups of 100, as the library datasets does."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": list(files.values())}), path, row_group_size=100)


def write_shards(path: Path, files: dict[str, bytes]) -> None:
    """Write tar shards."""
    path.mkdir()
    names = sorted(files)
    for first in range(0, len(names), SHARD):
        with tarfile.open(path / f"{first // SHARD:05d}.tar", "w") as archive:
            for name in names[first : first + SHARD]:
                info = tarfile.TarInfo(name)
                info.size = len(files[name])
                archive.addfile(info, io.BytesIO(files[name]))


WRITERS: dict[str, tuple[str, Callable[[Path, dict[str, bytes]], None], SourceFormat | None]] = {
    "folder": ("images", write_folder, None),
    "parquet": ("images.parquet", write_parquet, HuggingFaceFormat()),
    "shards": ("shards", write_shards, WebDatasetFormat()),
}


def batches(dataset: ImageDataset, workers: int, options: Options) -> Iterator[Any]:
    """Return the endless batches of a training."""
    data = ImageDataModule(dataset, options.batch, num_workers=workers)
    stage = SimpleNamespace(images_seen=0)
    trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=1, lightning_module=stage)
    data.trainer = cast(Any, trainer)
    return iter(data.train_dataloader())


def rounds(
    readers: dict[str, Iterator[Any]], count: int, options: Options, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Measure images/s of each reader, sorted; readers take turns."""
    for reader in readers.values():
        for _ in itertools.islice(reader, count):  # warm-up, and what workers prefetch
            pass
    measured: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(options.repeats):
        for name, reader in readers.items():
            begin = clock()
            for _ in itertools.islice(reader, count):
                pass
            measured[name].append(count * options.batch / (clock() - begin))
    return {name: sorted(speeds) for name, speeds in measured.items()}


def row(name: str, speeds: list[float], resolution: int = 0) -> str:
    """Format the median and the spread, and how many processes eight GPUs need."""
    median = statistics.median(speeds)
    text = f"  {name:24} {median:9,.0f} images/s ({speeds[0]:,.0f} to {speeds[-1]:,.0f})"
    trained = TRAINED.get(resolution, {})
    needs = [f"{math.ceil(GPUS * speed / median)} for {network}" for network, speed in trained.items()]
    return f"{text}  processes for {GPUS} GPUs: {', '.join(needs)}" if needs else text


def opened(path: Path, resolution: int, format: SourceFormat | None) -> tuple[ImageDataset, float]:
    """Open a dataset; return it and the seconds that this takes."""
    begin = time.perf_counter()
    return ImageDataset(path, resolution, format=format), time.perf_counter() - begin


def measure(folder: Path, stored: int, resolutions: list[int], options: Options) -> None:
    """Print the rows of one stored size."""
    paths: dict[str, tuple[Path, SourceFormat | None]] = {"zip": (folder / "images.zip", None)}
    files = write_zip(folder / "images.zip", options.images, stored)
    for name, (file, write, format) in WRITERS.items():
        write(folder / file, files)
        paths[name] = (folder / file, format)
    size = sum(map(len, files.values())) / len(files) / 1e3
    chosen = {name: paths[name] for name in options.formats.split(",")}
    for resolution in resolutions:
        print(f"\n{len(files)} PNGs of {stored}x{stored}, {size:.1f} KB each, to {resolution}x{resolution}")
        datasets = {}
        for name, (path, format) in chosen.items():
            datasets[name], first = opened(path, resolution, format)
            _, again = opened(path, resolution, format)
            print(f"  {name:24} opened in {first * 1e3:,.1f} ms, again in {again * 1e3:,.1f} ms")
        readers = {name: batches(dataset, 0, options) for name, dataset in datasets.items()}
        for name, speeds in rounds(readers, options.batches, options, time.process_time).items():
            print(row(f"{name}, one process", speeds, resolution), flush=True)
        for workers in map(int, options.workers.split(",")):
            for name, dataset in datasets.items():
                alone = {name: batches(dataset, workers, options)}
                count = options.batches * workers
                speeds = rounds(alone, count, options, time.perf_counter)[name]
                print(row(f"{name}, {workers} workers, clock", speeds), flush=True)
        cached = {"cached": batches(ImageDataset(folder / "images.zip", resolution, cache=True), 0, options)}
        for name, speeds in rounds(cached, options.cached, options, time.process_time).items():
            print(row(f"{name}, one process", speeds, resolution), flush=True)


def run(options: Options) -> None:
    """Print the rows of all sizes."""
    print(environment())
    resolutions = [int(side) for side in options.resolution.split(",")]
    for stored in map(int, options.stored.split(",")):
        with temporary_cache() as folder:
            smaller = [side for side in resolutions if side <= stored]
            measure(Path(folder), stored, smaller, options)


def temporary_cache() -> AbstractContextManager[str]:
    """Return a temporary folder, in which the library datasets has its cache too."""
    import datasets

    folder = tempfile.TemporaryDirectory()
    datasets.config.HF_DATASETS_CACHE = Path(folder.name) / "cache"
    return folder


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["batches=4"], __doc__ or "", Options, run))
