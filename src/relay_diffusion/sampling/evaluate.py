"""Evaluate existing images."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from relay_diffusion import __version__
from relay_diffusion.data.image_sets import ImageSet
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluator
from relay_diffusion.metrics.inception import CONVERSIONS
from relay_diffusion.sampling.options import SamplingOptions
from relay_diffusion.sampling.report import report
from relay_diffusion.sampling.tracking import log_results
from relay_diffusion.training.callbacks.preemption import Preemption, restored_signal_handlers
from relay_diffusion.utils.distributed import started_ranks
from relay_diffusion.utils.files import json_text, write_text
from relay_diffusion.utils.messages import shown_path
from relay_diffusion.utils.progress import progress


def measure_stored(
    options: SamplingOptions, trainer: L.Trainer, images: ImageSet, evaluator: Evaluator
) -> dict[str, Any]:
    """Evaluate the images of a folder, zip or .npz."""
    check_count(f"images={options.images}", len(images), trainer.num_devices * trainer.num_nodes)
    with started_ranks(trainer, options.run_id, str(options.output), "output"):
        if trainer.is_global_zero:
            write_text(options.output / "config.yaml", options.config)
        how = {"measured": {"path": str(images.path), "kind": images.kind, "hash": images.source_hash}}
        results = measure(options, trainer, evaluator, images, how, rounding=None)
        if trainer.is_global_zero:
            report(results)  # first, as a logger may fail
            log_results(trainer.loggers, options, results)
    return results


def check_count(option: str, count: int, processes: int) -> None:
    """Raise UserError if images are too few for metrics or devices."""
    if count < 2:
        raise UserError(f"{option}: metrics need at least 2 images; give more")
    if count < processes:
        raise UserError(f"{option}: {count} images for {processes} devices; use fewer devices")


def measure(
    options: SamplingOptions,
    trainer: L.Trainer,
    evaluator: Evaluator,
    images: ImageSet,
    how: dict[str, Any],
    rounding: str | None,
) -> dict[str, Any]:
    """Evaluate images; rank 0 writes metrics.json.

    how: settings to write beside the metrics. Collective.
    """
    began = time.perf_counter()
    with restored_signal_handlers():
        numbers = _compute(trainer, evaluator, images, options.batch_size)
    if not trainer.is_global_zero:
        return dict(numbers)
    results = how | numbers
    if conversions := images.conversions | CONVERSIONS[images.channels]:
        results["conversions"] = sorted(conversions)
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
    return results | {"numbers": shown_path(file), "names": list(numbers)}


@torch.inference_mode()
def _compute(trainer: L.Trainer, evaluator: Evaluator, images: ImageSet, batch_size: int) -> dict[str, float | int]:
    """Update with every `world_size`-th image and compute over all ranks."""
    Preemption().leave_at_signals(trainer)
    device, world = trainer.strategy.root_device, trainer.world_size
    evaluator.prepare(device, trainer.global_rank, trainer.strategy.barrier)
    mine = torch.arange(len(images))[trainer.global_rank :: world]
    done = 0
    with progress("measuring", len(images), enabled=trainer.is_global_zero) as advance:
        for batch in images.batches(batch_size, mine.tolist()):
            evaluator.update(batch.to(device), mine[done : done + len(batch)])
            done += len(batch)
            advance(min(len(batch) * world, len(images) - advance.done))  # counts all ranks as equally fast
    return evaluator.compute()
