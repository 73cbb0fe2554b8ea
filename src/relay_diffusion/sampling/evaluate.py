"""Evaluate images that exist: a loop over batches, split by rank."""

from __future__ import annotations

import os
import time
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from relay_diffusion import __version__
from relay_diffusion.data.image_sets import ImageSet
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluator
from relay_diffusion.sampling.options import ReferenceOptions, SamplingOptions
from relay_diffusion.sampling.report import report
from relay_diffusion.training.callbacks.preemption import Preemption, restored_signal_handlers
from relay_diffusion.utils.distributed import started_ranks
from relay_diffusion.utils.files import json_text, write_text
from relay_diffusion.utils.progress import progress


def measure_stored(
    options: SamplingOptions, trainer: L.Trainer, images: ImageSet, evaluator: Evaluator
) -> dict[str, Any]:
    """Evaluate existing images."""
    check_count(f"images={options.images}", len(images), trainer.num_devices * trainer.num_nodes)
    with started_ranks(trainer, options.run_id, str(options.output), "output"):
        if trainer.is_global_zero:
            write_text(options.output / "config.yaml", options.config)
        how = {"measured": {"path": str(images.path), "kind": images.kind, "hash": images.source_hash}}
        results = measure(options, trainer, evaluator, images, how, rounding=None)
    if trainer.is_global_zero:
        report(results)
    return results


def check_count(option: str, count: int, processes: int) -> None:
    """Raise UserError if the images are too few for statistics or for the devices."""
    if count < 2:
        raise UserError(f"{option}: statistics need at least 2 images")
    if count < processes:
        raise UserError(f"{option} are {count} images for {processes} devices: use fewer devices")


def build_evaluator(metrics: DictConfig, reference: ReferenceOptions, resolution: tuple[int, int]) -> Evaluator:
    """Build the evaluator for images [height, width] and check its reference."""
    source = instantiate(metrics.reference)(
        path=reference.path, subset=reference.subset, resolution=resolution, option=reference.option
    )
    source.check()  # before images are made
    evaluator: Evaluator = instantiate(metrics.evaluator, reference=source, _convert_="all")
    return evaluator


def measure(
    options: SamplingOptions,
    trainer: L.Trainer,
    evaluator: Evaluator,
    images: ImageSet,
    how: dict[str, Any],
    rounding: str | None,
) -> dict[str, Any]:
    """Return the numbers of images; rank 0 also writes metrics.json with how they were obtained."""
    began = time.perf_counter()
    with restored_signal_handlers():
        numbers = _compute(trainer, evaluator, images, options.batch_size)
    if not trainer.is_global_zero:
        return dict(numbers)
    results = how | numbers
    results |= {
        "not_measured": evaluator.skipped,
        "warnings": evaluator.warnings + evaluator.reference_warnings(images.resolution),
        "image_size": images.resolution,
        "departures": evaluator.departures(rounding),
        "seconds_measuring": round(time.perf_counter() - began, 1),
        "seeds": options.shown_seeds,
        "reference": {"path": options.reference.path, "subset": options.reference.subset},
        "evaluation": evaluator.describe(),
        "version": __version__,
        "torch": torch.__version__,
        "device": str(trainer.strategy.root_device),
    }
    file = options.output / "metrics.json"
    write_text(file, json_text(results))
    return results | {"numbers": os.path.relpath(file), "names": list(numbers)}


@torch.inference_mode()
def _compute(trainer: L.Trainer, evaluator: Evaluator, images: ImageSet, batch_size: int) -> dict[str, float | int]:
    """Feed this rank's images, every `world_size`-th one, and compute over all ranks."""
    Preemption().leave_at_signals(trainer)
    device, world = trainer.strategy.root_device, trainer.world_size
    evaluator.prepare(device, trainer.global_rank, trainer.strategy.barrier)
    mine = torch.arange(len(images))[trainer.global_rank :: world]
    done = 0
    with progress("measuring", len(images), enabled=trainer.is_global_zero) as advance:
        for batch in images.batches(batch_size, mine.tolist()):
            evaluator.update(batch.to(device), mine[done : done + len(batch)])
            done += len(batch)
            advance(min(len(batch) * world, len(images) - advance.done))  # as if all ranks were equally fast
    return evaluator.compute()
