"""From a validated config to sampled and measured images."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from relay_diffusion import __version__
from relay_diffusion.callbacks import Evaluator, ImageWriter, RelayPicture, SamplingProgress
from relay_diffusion.config import write_config
from relay_diffusion.errors import UserError
from relay_diffusion.files import write_text
from relay_diffusion.relay import Relay
from relay_diffusion.samples import ImageFolder, SeedDataModule, choose_labels, parse_seeds
from relay_diffusion.training import quiet_lightning


def _remaining(folder: ImageFolder, seeds: list[int], processes: int) -> list[int]:
    """Seeds still to be sampled; none, or at least one a process, so that no process waits for an idle one."""
    missing = folder.missing(seeds)
    present = [seed for seed in seeds if seed not in set(missing)]
    return sorted(missing + present[: max(0, processes - len(missing))]) if missing else []


def sample(cfg: DictConfig) -> dict[str, Any]:
    """Sample the images that are not there yet, and measure all of them if mode=evaluate; returns the results."""
    quiet_lightning()
    seeds = parse_seeds(cfg.seeds)
    relay: Relay = instantiate(cfg.relay, _convert_="all")
    labels = choose_labels(seeds, cfg["class"], relay.num_classes, relay.class_names)
    settings: dict[str, Any] = {"stages": relay.describe(), "class": cfg["class"], "precision": cfg.trainer.precision}
    output = Path(cfg.output)
    where = {name: {k: v for k, v in stage.items() if k != "file"} for name, stage in settings["stages"].items()}
    folder = ImageFolder(output / "images", settings | {"stages": where})  # a moved checkpoint is the same one
    evaluator: Evaluator | None = None
    if cfg.mode == "evaluate":
        evaluator = instantiate(cfg.metrics, resolution=relay.resolution, folder=folder, _convert_="all")

    trainer: L.Trainer = instantiate(cfg.trainer, _convert_="all")
    processes = trainer.num_devices * trainer.num_nodes
    if evaluator is not None and len(seeds) < 2:
        raise UserError(f"seeds={cfg.seeds}: statistics need at least 2 images")
    if len(seeds) < processes:
        raise UserError(f"seeds={cfg.seeds} are fewer images than the {processes} devices: use fewer devices")
    todo = _remaining(folder, seeds, processes)
    if evaluator is not None and not todo:
        todo = seeds[:processes]  # the measurement runs beside the sampling
    done = sorted(set(seeds) - set(todo))
    callbacks: list[Callback] = [SamplingProgress("sampling", len(seeds), done=len(done)), ImageWriter(folder)]
    if cfg.picture:
        callbacks.append(RelayPicture(output / "relay.png", count=cfg.picture))
    if evaluator is not None:
        evaluator.done = done
        callbacks.append(evaluator)
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]

    if trainer.is_global_zero:
        write_config(cfg, str(output))
    began = time.perf_counter()
    if todo:
        label_of = dict(zip(seeds, labels, strict=True))
        data = SeedDataModule(todo, [label_of[seed] for seed in todo], cfg.batch_size)
        trainer.predict(relay, datamodule=data, return_predictions=False)
    results: dict[str, Any] = {"images": len(seeds), "sampled_now": len(todo), "folder": os.path.relpath(folder.folder)}
    if trainer.is_global_zero:
        if evaluator is not None:
            results |= evaluator.results | {
                "seconds": round(time.perf_counter() - began, 1),
                "seeds": str(cfg.seeds),
                "settings": settings,
                "protocol": evaluator.describe(),
                "version": __version__,
                "torch": torch.__version__,
                "device": str(trainer.strategy.root_device),
            }
            write_text(output / "metrics.json", json.dumps(results, indent=1))
        report(results, output, bool(cfg.picture and todo))
    return results


def report(results: dict[str, Any], output: Path, picture: bool) -> None:
    """The results as a table, and where everything lies."""
    table = Table(show_header=False, box=None)
    for key, label, form in (("fid", "FID", ".2f"), ("sfid", "sFID", ".2f"), ("images", "images", ",")):
        if key in results:
            table.add_row(label, format(results[key], form))
    table.add_row("images in", results["folder"])
    if picture:
        table.add_row("picture", os.path.relpath(output / "relay.png"))
    if "fid" in results:
        table.add_row("numbers in", os.path.relpath(output / "metrics.json"))
    Console(soft_wrap=True).print(table)
