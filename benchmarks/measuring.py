"""Functions for quality against cost: sampling with its time, FID, and tables that grow by rows."""

from __future__ import annotations

import csv
import hashlib
import io
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluator
from relay_diffusion.models import DiffusionStage
from relay_diffusion.networks import UNet
from relay_diffusion.networks.flops import forward_flops
from relay_diffusion.samplers import Sampler
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.resolution import Size

WEIGHTS = "weights"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype of autocast for a precision of Lightning; None: no autocast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def draw(
    stage: DiffusionStage,
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Tensor,
    previous: Tensor | None,
    batch: int,
    precision: torch.dtype | None = torch.bfloat16,
    consistency: bool = False,
    size: Size | None = None,
) -> tuple[Tensor, float]:
    """Sample an image for each seed and time it.

    labels [N]; previous: float [N,C,h,w] on the stage's device; consistency: tie block means to it. size: (height,
    width); None: as trained. Returns float
    images [N,C,H,W] there, and the seconds per image: their median over the batches, which leaves out the capture of
    CUDA graphs.
    """
    stage.sampler = sampler
    parts, times = [], []
    for first in range(0, len(seeds), batch):
        chosen = slice(first, first + batch)
        shape = (len(seeds[chosen]), stage.image_channels, *(size or stage.size))
        known = labels[chosen] if stage.num_classes else None
        small = None if previous is None else previous[chosen]
        began = time.perf_counter()
        with torch.autocast(stage.device.type, precision, enabled=precision is not None):
            parts.append(stage.sample(shape, seeds[chosen], known, small, consistency))
        times.append((time.perf_counter() - began) / shape[0])  # `sample` synchronizes with the device
    return torch.cat(parts), statistics.median(times)


def score(evaluator: Evaluator, images: Tensor, batch: int) -> dict[str, float | int]:
    """Evaluate finished images, uint8 [N,3,H,W]."""
    evaluator.reset()
    for part, positions in zip(images.split(batch), torch.arange(len(images)).split(batch), strict=True):
        evaluator.update(part, positions)
    return evaluator.compute()


def tflop(stage: DiffusionStage, sampler: Sampler, size: Size | None = None) -> float:
    """Compute the operations per image of a stage, in 10^12.

    size: (height, width); None: as trained.
    """
    return (
        _operations(stage.denoiser.network, size or stage.size)
        * sampler.evaluations
        * (1 if stage.guidance_scale == 1 else 2)
        / 1e12
    )


@cache
def _operations(network: UNet, size: Size) -> int:
    return forward_flops(network, size)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def weights_hash(stages: Iterable[DiffusionStage]) -> str:
    """Hash the weights of stages, with those of guides: 12 hexadecimal digits."""
    return hashlib.sha256("".join(stage.weights_hash() for stage in stages).encode()).hexdigest()[:12]


def read_rows(path: Path, columns: Sequence[str], option: str = "output") -> list[dict[str, str]]:
    """Read the rows of a table, with the column of `weights_hash`, which older files lack.

    There are none if the file does not exist. Raises UserError for other columns, naming the option.
    """
    if not path.exists():
        return []
    known = [*columns, WEIGHTS]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or []) not in (known, [*columns]):
            raise UserError(f"{option}={path}: must have the columns {','.join(known)}; use another file")
        return [{WEIGHTS: "", **row} for row in reader]


class Table:
    """CSV file with a row for each measurement; existing rows are kept.

    key: columns that identify a measurement. The last column, `weights`, is the hash of the weights that the row was
    measured with; rows of older files lack it. Raises UserError for a file with other columns.
    """

    def __init__(self, path: Path, key: Sequence[str], columns: Sequence[str]) -> None:
        self.path, self.key, self.columns = path, key, [*columns, WEIGHTS]
        self.rows = read_rows(path, columns)
        self._of_key = {tuple(row[name] for name in key): row for row in self.rows}

    def find(self, key: Sequence[str], weights: str) -> dict[str, str] | None:
        """Return the row of a measurement, if there is one.

        Raises UserError if it was measured with other weights.
        """
        row = self._of_key.get(tuple(key))
        if row is not None and row[WEIGHTS] not in ("", weights):
            place = " ".join(f"{name}={value}" for name, value in zip(self.key, key, strict=True))
            raise UserError(f"output={self.path}: the row {place} has other weights; use another output")
        return row

    def add(self, key: Sequence[str], weights: str, measured: Mapping[str, str]) -> dict[str, str]:
        """Add the row of a measurement, write the file, and return the row."""
        row = {**dict(zip(self.key, key, strict=True)), **measured, WEIGHTS: weights}
        self.rows.append(row)
        self._of_key[tuple(key)] = row
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
        return row

    def report(self, found: Iterable[Mapping[str, str] | None]) -> None:
        """Print how many measurements were there already, and how many of them lack the hash of their weights.

        found: results of `find`.
        """
        kept = [row for row in found if row is not None]
        unknown = sum(not row[WEIGHTS] for row in kept)
        if kept:
            print(f"{self.path}: kept {len(kept)} rows, {unknown} without the hash of their weights", flush=True)
