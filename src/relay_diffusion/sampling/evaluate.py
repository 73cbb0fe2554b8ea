"""Evaluate images that exist: a loop over batches, split by rank."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from relay_diffusion import __version__
from relay_diffusion.data.image_sets import ImageSet, open_image_set
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluator
from relay_diffusion.sampling.options import reference_of
from relay_diffusion.sampling.report import report
from relay_diffusion.training.callbacks.preemption import Preemption
from relay_diffusion.utils.distributed import started_ranks
from relay_diffusion.utils.files import json_text, write_text
from relay_diffusion.utils.progress import progress


def measure_stored(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate the images of the option `images`."""
    images = open_image_set(cfg.images, option="images")
    evaluator = build_evaluator(cfg, images.resolution)
    trainer: L.Trainer = instantiate(cfg.trainer, _convert_="all")
    check_count(f"images={cfg.images}", len(images), trainer.num_devices * trainer.num_nodes)
    with started_ranks(trainer, str(cfg.run_id), cfg.output, "output"):
        if trainer.is_global_zero:
            write_text(Path(cfg.output) / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        how = {"measured": {"path": str(images.path), "kind": images.kind, "hash": images.source_hash}}
        results = measure(cfg, trainer, evaluator, images, how, rounding=None)
    if trainer.is_global_zero:
        report(results)
    return results


def check_count(option: str, count: int, processes: int) -> None:
    """Raise UserError if the images are too few for statistics or for the devices."""
    if count < 2:
        raise UserError(f"{option}: statistics need at least 2 images")
    if count < processes:
        raise UserError(f"{option} are {count} images for {processes} devices: use fewer devices")


def build_evaluator(cfg: DictConfig, resolution: tuple[int, int]) -> Evaluator:
    """Build the evaluator for images [height, width]."""
    option = "reference" if cfg.reference is not None else "relay.reference.path"
    source = instantiate(cfg.metrics.reference)(**reference_of(cfg), resolution=resolution, option=option)
    source.check()  # before images are made
    evaluator: Evaluator = instantiate(cfg.metrics.evaluator, reference=source, _convert_="all")
    return evaluator


def measure(
    cfg: DictConfig,
    trainer: L.Trainer,
    evaluator: Evaluator,
    images: ImageSet,
    how: dict[str, Any],
    rounding: str | None,
) -> dict[str, Any]:
    """Return the numbers of images; rank 0 also writes metrics.json with how they were obtained."""
    began = time.perf_counter()
    numbers = _compute(trainer, evaluator, images, cfg.batch_size)
    if not trainer.is_global_zero:
        return dict(numbers)
    results = how | numbers
    results |= {
        "not_measured": evaluator.skipped,
        "warnings": evaluator.warnings + evaluator.reference_warnings(images.resolution),
        "image_size": images.resolution,
        "departures": evaluator.departures(rounding),
        "seconds_measuring": round(time.perf_counter() - began, 1),
        "seeds": _seeds(cfg),
        "reference": reference_of(cfg),
        "evaluation": evaluator.describe(),
        "version": __version__,
        "torch": torch.__version__,
        "device": str(trainer.strategy.root_device),
    }
    file = Path(cfg.output) / "metrics.json"
    write_text(file, json_text(results))
    return results | {"numbers": os.path.relpath(file), "names": list(numbers)}


@torch.inference_mode()
def _compute(trainer: L.Trainer, evaluator: Evaluator, images: ImageSet, batch_size: int) -> dict[str, float | int]:
    """Feed this rank's images, every `world_size`-th one, and compute over all ranks."""
    before, preemption = list(trainer.callbacks), Preemption()  # type: ignore[attr-defined]
    trainer.callbacks = [*before, preemption]  # type: ignore[attr-defined]
    preemption.leave_at_signals(trainer)
    try:
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
    finally:
        trainer.callbacks = before  # type: ignore[attr-defined]


def _seeds(cfg: DictConfig) -> str | None:
    """What was asked for: the seeds, or all of the images that were enlarged; None for images that were there."""
    if cfg.images is not None:
        return None
    every = cfg.relay.seeds if cfg.relay.start is None else "all"
    return str(every if cfg.seeds is None else cfg.seeds)
