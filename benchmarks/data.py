"""Time reading batches of uint8 images from a zip.

python benchmarks/data.py [key=value ...]

The synthetic PNGs have the file size of photographs and are decoded as in training. The ratio is to the training
throughput of the authors' code on one H200 (images/s: 369 at 64x64, 40.6 at 256x256); below 1, reading limits training.

  images       number of images in the zip                  (512)
  stored       resolution of the PNGs                       (256)
  resolution   pixels after box averaging; comma-separated  (256,64)
  workers      worker processes (0: main process); comma-separated (0,1,2)
  batch        images per batch                             (32)
  batches      number of timed batches per row              (16)
  zip          a zip to read instead                        ("")
"""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timing import environment, line, seconds

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.diffusion.pixels import to_float

TRAINED = {64: 369.0, 256: 40.6}  # images/s


@dataclass
class Options:
    """Options of this command; see above."""

    images: int = 512
    stored: int = 256
    resolution: str = "256,64"
    workers: str = "0,1,2"
    batch: int = 32
    batches: int = 16
    zip: str = ""


def write_zip(path: Path, images: int, side: int) -> None:
    """Write smooth images with noise, about 100 KB per 256x256 PNG."""
    generator = np.random.default_rng(0)
    with image_zip(path) as archive:
        for index in range(images):
            coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
            grain = generator.normal(0, 2, smooth.shape).round().astype(np.int16)
            archive.add(f"{index:06d}.png", Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)))


def attach(data: ImageDataModule) -> None:
    """Attach the attributes of a Trainer that the data module reads."""
    stage = SimpleNamespace(images_seen=0)
    data.trainer = cast(Any, SimpleNamespace(global_rank=0, world_size=1, lightning_module=stage))


def loading(path: Path, resolution: int, workers: int, options: Options) -> tuple[list[float], float]:
    """Measure seconds between batches (sorted) and until the first batch.

    The times between batches are taken after the start of the workers.
    """
    data = ImageDataModule(ImageDataset(path, resolution), options.batch, num_workers=workers)
    attach(data)
    begin = time.perf_counter()
    batches = iter(data.train_dataloader())
    next(batches)
    first = time.perf_counter() - begin
    for _ in itertools.islice(batches, 2 * workers):  # skip prefetched batches
        pass
    # time a round of all workers, because batches arrive in bursts
    rounds = max(1, workers)
    times = []
    for _ in range(max(1, options.batches // rounds)):
        begin = time.perf_counter()
        for _ in itertools.islice(batches, rounds):
            pass
        times.append((time.perf_counter() - begin) / rounds)
    return sorted(times), first


def run(options: Options) -> None:
    """Print times of decoding, then a row per resolution and worker count."""
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.zip or Path(folder) / "images.zip")
        if not options.zip:
            write_zip(path, options.images, options.stored)
        for resolution in map(int, options.resolution.split(",")):
            dataset = ImageDataset(path, resolution)
            name = dataset.names[0]
            encoded = dataset._source.read(name)
            size = f"{len(encoded) / 1e3:.0f} KB to {resolution}x{resolution}"
            print(line("read a member", seconds(lambda d=dataset, n=name: d._source.read(n), 50), 1))
            print(line("decode", seconds(lambda e=encoded: Image.open(io.BytesIO(e)).convert("RGB"), 50), 1))
            print(line(f"read, decode, tensor, {size}", seconds(lambda d=dataset: d[0], 50), 1))
            batch = torch.stack([dataset[i % len(dataset)][0] for i in range(options.batch)])
            print(line(f"batch of {options.batch} to [-1, 1]", seconds(lambda b=batch: to_float(b), 20), options.batch))
            for workers in map(int, options.workers.split(",")):
                times, first = loading(path, resolution, workers, options)
                row = line(f"batches, {workers} workers", times, options.batch, TRAINED.get(resolution))
                print(f"{row}  first after {first:.2f} s", flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["batches=16"], __doc__ or "", Options, run))
