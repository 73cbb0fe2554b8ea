"""From a validated config to a trained stage."""

from __future__ import annotations

import os
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from relay_diffusion.callbacks.checkpoints import dealt
from relay_diffusion.callbacks.preemption import leave_if_preempted, preempted
from relay_diffusion.checkpoint import (
    KEPT,
    LAST,
    find_checkpoint,
    find_stage,
    read_checkpoint,
    read_stage,
    stored_weights,
)
from relay_diffusion.checks import naming
from relay_diffusion.config import write_config
from relay_diffusion.data import ImageDataModule
from relay_diffusion.differences import differences, first_difference, printable
from relay_diffusion.errors import UserError
from relay_diffusion.host import prepare_host, report_slow_settings
from relay_diffusion.launch import leave_group
from relay_diffusion.quiet import quiet_libraries
from relay_diffusion.revision import git_revision
from relay_diffusion.stage import DiffusionStage
from relay_diffusion.trainer import children_end_too


def check_classes(data: ImageDataModule, num_classes: int) -> None:
    """Refuse a network whose classes are not those of the data."""
    there = data.dataset.num_classes
    if num_classes and num_classes != there:
        otherwise = "" if there else " (folders become classes by python -m relay_diffusion.data.convert)"
        raise UserError(
            f"network.num_classes={num_classes}, but {data.dataset.path} has {there} classes: use "
            f"network.num_classes={there}{otherwise}"
        )


def last_checkpoint(cfg: DictConfig) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from, and its content: this run's last, or else `resume`; None for a new run.

    One of this run that is damaged is passed over, with a warning, for the one before.
    Raises UserError if none of those that are there can be read.
    """
    directory = OmegaConf.select(cfg, "callbacks.checkpoints.directory")
    own = [Path(directory) / LAST, *sorted(Path(directory).glob(KEPT), reverse=True)] if directory else []
    failures = []
    for path in own:
        if path.exists():
            try:
                return path, read_checkpoint(path)
            except UserError as error:
                failures.append(str(error))
                print(f"warning: {error}; trying the checkpoint before", file=sys.stderr, flush=True)
    if failures:
        raise UserError(f"no checkpoint in {directory} can be read: delete them to begin anew ({failures[0]})")
    if cfg.resume is None:
        return None
    with naming("resume"):
        return find_checkpoint(cfg.resume), read_checkpoint(cfg.resume)


def check_same_stage(path: Path, checkpoint: dict[str, Any], stage_config: dict[str, Any]) -> None:
    """Refuse to continue from a checkpoint of another stage or with another optimizer.

    The learning rate may change, and what changes speed and memory alone.
    """
    stored, present = _what_a_run_keeps(checkpoint["stage_config"]), _what_a_run_keeps(stage_config)
    if stored != present:
        difference = first_difference(stored, present)
        raise UserError(f"{path} holds another stage ({difference}): choose another run_dir, or options as there")


def check_same_classes(path: Path, checkpoint: dict[str, Any], data: ImageDataModule) -> None:
    """Refuse to continue with classes of other names or order: the network would take one for another."""
    there, here = checkpoint.get("class_names", []), data.dataset.class_names
    if there and here and there != here:
        number, before, now = next((i, *pair) for i, pair in enumerate(zip_longest(there, here)) if len({*pair}) > 1)
        raise UserError(
            f"{path} was trained on other classes than data.dataset.path={data.dataset.path} has (class {number} is "
            f"{before} there, {now} here): choose another run_dir; init={path} begins there with its weights"
        )


def _what_a_run_keeps(stage_config: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {
        part: stage_config.get(part) or {} for part in ("denoiser", "corruption", "optimizer")
    }
    # What older files do not have: condition_channels, and the log-normal of a relay stage.
    network = {"condition_channels": 0} | (parts["denoiser"].get("network") or {})
    schedule = {"p_mean": -1.2, "p_std": 1.2} | (parts["corruption"].get("schedule") or {})
    network = _without(network, "checkpoint_levels")
    return parts | {
        "denoiser": parts["denoiser"] | {"network": network},
        "corruption": parts["corruption"] | {"schedule": schedule},
        "optimizer": _without(parts["optimizer"], "lr", "fused"),
    }


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}


def begin_with(stage: DiffusionStage, path: str) -> Path:
    """Give a stage the averaged weights that are stored at `path`, or the raw ones if it was trained without average.

    Returns the file. Raises UserError naming it, if they are not there or those of another network.
    """
    with naming("init"):
        file = find_stage(path)
        content = read_stage(file)
    kind = "ema" if content.get("ema", {}).get("weights") else "raw"
    with naming("init takes the weights of a stage that has the network of this run"):
        weights = stored_weights(content, kind, stage.denoiser, file)
    stage.denoiser.load_state_dict(weights)
    return file


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What a continued run does in another way: " with devices 2 -> 1"."""
    # what an older checkpoint does not know is no change, nor is what it knows beyond
    changed = [
        f"{key} {printable(there)} -> {printable(here)}"
        for key, there, here in differences(before, now)
        if there is not None and here is not None
    ]
    return f" with {', '.join(changed)}" if changed else ""


@quiet_libraries()
def train(cfg: DictConfig) -> DiffusionStage:
    """Build everything, continue from a checkpoint if there is one, and fit."""
    stage_config = cast(dict[str, Any], OmegaConf.to_container(cfg.stage, resolve=True))
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data: ImageDataModule = instantiate(cfg.data, _convert_="all")
    check_classes(data, cfg.network.num_classes)
    found = last_checkpoint(cfg)
    checkpoint, changed = None, ""
    if found is not None:
        checkpoint, content = found
        check_same_stage(checkpoint, content, stage_config)
        check_same_classes(checkpoint, content, data)
        if content["images_seen"] >= cfg.trainer.max_images:
            raise UserError(
                f"{os.path.relpath(checkpoint)} has seen {content['images_seen']:,} images already: nothing to do "
                f"unless trainer.max_images={cfg.trainer.max_images} grows"
            )
    stage: DiffusionStage = instantiate(cfg.stage, _convert_="all")
    stage.stage_config, stage.class_names = stage_config, data.dataset.class_names
    begun = begin_with(stage, cfg.init) if found is None and cfg.init is not None else None
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=list(instantiate(cfg.callbacks, _convert_="all").values()),
        logger=list(instantiate(cfg.logger, _convert_="all").values()),
        _convert_="all",
    )
    if found is not None:
        before = {"stage": content["stage_config"]} | content.get("dealt", {})
        changed = _changes(before, {"stage": stage_config} | dealt(trainer, data))
    if trainer.is_global_zero:
        write_config(cfg, cfg.run_dir)
        settings, revision = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)), git_revision()
        for logger in trainer.loggers:
            logger.log_hyperparams(settings | ({"git": revision} if revision else {}))
        parameters = sum(p.numel() for p in stage.denoiser.parameters())
        where = "new run" if begun is None else f"new run with the weights of {os.path.relpath(begun)}"
        where = f"continues {os.path.relpath(checkpoint)}{changed}" if checkpoint else where
        images = len(data.dataset.names)
        print(f"{os.path.relpath(cfg.run_dir)}: {where}, {parameters:,} parameters, {images:,} images", flush=True)
        report_slow_settings(trainer.strategy.root_device, {"network.channels_last": stage.denoiser.network})
    prepare_host(trainer.strategy.root_device)
    with children_end_too(trainer):
        trainer.fit(stage, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if stage.images_seen < cfg.trainer.max_images and preempted(trainer):
        leave_group()  # all ranks are here
        leave_if_preempted(trainer)
    if trainer.is_global_zero:
        print(f"trained on {stage.images_seen:,} images; all is in {os.path.relpath(cfg.run_dir)}")
    return stage
