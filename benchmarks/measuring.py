"""Functions for quality against cost: sampling with its time, FID, and tables that grow by rows."""

from __future__ import annotations

import csv
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
) -> tuple[Tensor, float]:
    """Sample an image for each seed and time it.

    labels [N]; previous: float [N,C,h,w] on the stage's device; consistency: tie block means to it. Returns float
    images [N,C,H,W] there, and the seconds per image: their median over the batches, which leaves out the capture of
    CUDA graphs.
    """
    stage.sampler = sampler
    side, parts, times = stage.resolution, [], []
    for first in range(0, len(seeds), batch):
        chosen = slice(first, first + batch)
        shape = (len(seeds[chosen]), stage.image_channels, side, side)
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


def tflop(stage: DiffusionStage, sampler: Sampler) -> float:
    """Compute the operations per image of a stage, in 10^12."""
    return _operations(stage.denoiser.network) * sampler.evaluations * (1 if stage.guidance_scale == 1 else 2) / 1e12


@cache
def _operations(network: UNet) -> int:
    return forward_flops(network)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def read_rows(path: Path, columns: Sequence[str], option: str = "output") -> list[dict[str, str]]:
    """Read the rows of a table. There are none if the file does not exist.

    Raises UserError for other columns, naming the option.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or []) != list(columns):
            raise UserError(f"{option}={path}: must have the columns {','.join(columns)}; use another file")
        return list(reader)


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a table atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
