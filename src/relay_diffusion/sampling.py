"""From a validated config to sampled and measured images."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from relay_diffusion import __version__
from relay_diffusion.callbacks import Evaluator, ImageWriter, RelayPicture, SamplingProgress
from relay_diffusion.config import chosen_stages, reference_of, write_config
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.images import ImageDataset
from relay_diffusion.errors import UserError
from relay_diffusion.files import write_text
from relay_diffusion.image_store import ImageStore
from relay_diffusion.interop.adm import write_adm_samples
from relay_diffusion.plan import Plan, PlanDataModule, class_indices, plan_from_images, plan_from_noise
from relay_diffusion.relay import Relay
from relay_diffusion.report import report
from relay_diffusion.stored import StoredDataModule, StoredImages
from relay_diffusion.training import quiet_lightning


def build_relay(cfg: DictConfig) -> Relay:
    """The stages that the config chooses, as one relay."""
    stages = {name: instantiate(stage, _convert_="all") for name, stage in chosen_stages(cfg.relay).items()}
    settings = {key: cfg.relay[key] for key in ("hand_over_sigma", "rounding")}
    postprocess = instantiate(cfg.relay.postprocess)
    return Relay(stages, postprocess=postprocess, **settings)


def build_evaluator(cfg: DictConfig, resolution: tuple[int, int], rounding: str) -> Evaluator:
    """The measurement of images [height, width] that became 8-bit by `rounding`."""
    option = "reference" if cfg.reference is not None else "relay.reference.path"
    source = instantiate(cfg.metrics.reference)(**reference_of(cfg), resolution=resolution, option=option)
    evaluator: Evaluator = instantiate(cfg.metrics.evaluator, reference=source, _convert_="all")
    if evaluator.protocol is not None:
        evaluator.protocol = replace(evaluator.protocol, rounding=rounding)  # record what was done
    return evaluator


def make_plan(cfg: DictConfig, relay: Relay) -> Plan:
    """Which images to make. Raises UserError where seeds, classes or starting images make no sense."""
    size, path, chosen = relay.start_resolution, cfg.relay.start, _chosen_class(cfg)
    if size is None:
        if path is not None:
            raise UserError(f"relay.start={path}: the stage {next(iter(relay.chain()))} starts from noise")
        return plan_from_noise(cfg.seeds, class_indices(chosen, relay.num_classes, relay.class_names))
    if path is None:
        name = next(iter(relay.chain()))
        raise UserError(
            f"relay.stages.{name} enlarges images of {size}x{size}: give relay.start=FOLDER, or a first stage"
        )
    start = ImageDataset(path, size, labels=bool(relay.num_classes), option="relay.start")
    for label in set(start.labels):
        if label >= relay.num_classes:
            raise UserError(
                f"relay.start={path} has class {label}, the model knows {relay.num_classes}: give class=..."
            )
    classes = None if chosen is None else class_indices(chosen, relay.num_classes, relay.class_names)
    return plan_from_images(start, cfg.seeds, classes)


def remaining(plan: Plan, store: ImageStore, processes: int) -> list[int]:
    """Positions still to be made; none, or at least one a process, so that no process waits for an idle one."""
    missing = [position for position, name in enumerate(plan.names) if name not in store]
    there = set(missing)
    present = [position for position in range(len(plan.names)) if position not in there]
    return sorted(missing + present[: max(0, processes - len(missing))]) if missing else []


def sample(cfg: DictConfig) -> dict[str, Any]:
    """Make the images that are not there yet, measure all of them if mode=evaluate; returns the results."""
    quiet_lightning()
    return measure_stored(cfg) if cfg.images is not None else sample_relay(cfg)


def measure_stored(cfg: DictConfig) -> dict[str, Any]:
    """Measure images that exist."""
    images = open_image_set(cfg.images, option="images")
    evaluator = build_evaluator(cfg, images.resolution, "as stored")
    trainer: L.Trainer = instantiate(cfg.trainer, _convert_="all")
    _check_count(f"images={cfg.images}", len(images), evaluator, trainer)
    trainer.callbacks.extend([SamplingProgress("measuring", len(images)), evaluator])  # type: ignore[attr-defined]
    output = Path(cfg.output)
    if trainer.is_global_zero:
        write_config(cfg, str(output))
    began = time.perf_counter()
    trainer.predict(StoredImages(), datamodule=StoredDataModule(images, cfg.batch_size), return_predictions=False)
    source = {"path": str(images.path), "kind": images.kind, "hash": images.source_hash}
    return _results(cfg, trainer, evaluator, {"measured": source}, time.perf_counter() - began, {"images": len(images)})


def sample_relay(cfg: DictConfig) -> dict[str, Any]:
    """Make the images that are not there yet, and measure all of them if mode=evaluate."""
    relay = build_relay(cfg)
    plan = make_plan(cfg, relay)
    settings = relay.describe() | {"class": _chosen_class(cfg), "precision": cfg.trainer.precision}
    settings["start"] = None if plan.start is None else {"path": str(plan.start.path), "hash": plan.start.source_hash}
    output = Path(cfg.output)
    store = ImageStore(output, _without_places(settings))
    evaluator = (
        build_evaluator(cfg, (relay.resolution, relay.resolution), relay.rounding) if cfg.mode == "evaluate" else None
    )

    trainer: L.Trainer = instantiate(cfg.trainer, _convert_="all")
    processes = trainer.num_devices * trainer.num_nodes
    _check_count(f"seeds={cfg.seeds}", len(plan.seeds), evaluator, trainer)
    todo = remaining(plan, store, processes)
    if evaluator is not None and not todo:
        todo = list(range(processes))  # the measurement runs beside the sampling
    done = sorted(set(range(len(plan.names))) - set(todo))
    progress = SamplingProgress("sampling", len(plan.names), done=len(done))
    trainer.callbacks.extend([progress, ImageWriter(store, plan)])  # type: ignore[attr-defined]
    if cfg.picture:
        trainer.callbacks.append(RelayPicture(output / "relay.png", count=cfg.picture))  # type: ignore[attr-defined]
    if evaluator is not None:
        evaluator.done = lambda rank, devices: _stored(store, plan, done[rank::devices], cfg.batch_size)
        trainer.callbacks.append(evaluator)  # type: ignore[attr-defined]

    if trainer.is_global_zero:
        write_config(cfg, str(output))
    began = time.perf_counter()
    if todo:
        trainer.predict(relay, datamodule=PlanDataModule(plan, todo, cfg.batch_size), return_predictions=False)
    seconds = time.perf_counter() - began
    results: dict[str, Any] = {"images": len(plan.names), "sampled_now": len(todo)}
    if trainer.is_global_zero:
        results |= _pack(cfg, relay, plan, store)
        if cfg.picture and todo:
            results["picture"] = os.path.relpath(output / "relay.png")
    return _results(cfg, trainer, evaluator, {"settings": settings, "seeds": str(cfg.seeds)}, seconds, results)


def _check_count(option: str, count: int, evaluator: Evaluator | None, trainer: L.Trainer) -> None:
    processes = trainer.num_devices * trainer.num_nodes
    if evaluator is not None and count < 2:
        raise UserError(f"{option}: statistics need at least 2 images")
    if count < processes:
        raise UserError(f"{option} are fewer images than the {processes} devices: use fewer devices")


def _stored(store: ImageStore, plan: Plan, positions: list[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    first = 0
    for batch in store.batches([plan.names[position] for position in positions], batch_size):
        yield torch.tensor(positions[first : first + len(batch)]), batch
        first += len(batch)


def _without_places(node: Any) -> Any:
    """Settings without where files lie: a moved checkpoint is the same one, by its hash."""
    if not isinstance(node, dict):
        return node
    return {key: _without_places(value) for key, value in node.items() if key not in ("file", "path")}


def _chosen_class(cfg: DictConfig) -> Any:
    chosen = cfg["class"]
    return list(chosen) if isinstance(chosen, ListConfig) else chosen


def _pack(cfg: DictConfig, relay: Relay, plan: Plan, store: ImageStore) -> dict[str, Any]:
    """Write the zip and the .npz that were asked for; where the images are."""
    output, known = Path(cfg.output), min(plan.labels) >= 0
    if cfg.format == "zip":
        numbers = [str(index) for index in range(relay.num_classes)]
        store.pack(plan.names, plan.labels, (relay.class_names or numbers) if known else None)
    places = {"folder": os.path.relpath(store.archive if cfg.format == "zip" else store.folder)}
    if cfg.npz:
        labels = plan.labels if known else None
        size = (relay.resolution, relay.resolution)
        batches = store.batches(plan.names, cfg.batch_size)
        write_adm_samples(output / "images.npz", batches, len(plan.names), size, labels)
        places["npz"] = os.path.relpath(output / "images.npz")
    return places


def _results(
    cfg: DictConfig,
    trainer: L.Trainer,
    evaluator: Evaluator | None,
    how: dict[str, Any],
    seconds: float,
    results: dict[str, Any],
) -> dict[str, Any]:
    """On the first device: the measured numbers and how they were obtained, into metrics.json and on the screen."""
    if not trainer.is_global_zero:
        return results
    if evaluator is not None:
        results |= evaluator.results | {
            "not_measured": evaluator.skipped,
            "seconds": round(seconds, 1),
            **how,
            "evaluation": evaluator.describe(),
            "version": __version__,
            "torch": torch.__version__,
            "device": str(trainer.strategy.root_device),
        }
        write_text(Path(cfg.output) / "metrics.json", json.dumps(results, indent=1))
        results["numbers"] = os.path.relpath(Path(cfg.output) / "metrics.json")
    report(results)
    return results
