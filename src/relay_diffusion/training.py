"""From a validated config to a trained stage."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from relay_diffusion.checkpoint import LAST, find_checkpoint, read_checkpoint
from relay_diffusion.config import write_config
from relay_diffusion.data import ImageDataModule
from relay_diffusion.errors import UserError
from relay_diffusion.stage import DiffusionStage


def quiet_lightning() -> None:
    """Keep Lightning's advertisements and its advice on epochs and loaders off the screen; warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)


def check_classes(data: ImageDataModule, num_classes: int) -> None:
    """Refuse a network whose classes are not those of the data."""
    there = data.dataset.num_classes
    if num_classes and num_classes != there:
        raise UserError(f"network.num_classes={num_classes}, but {data.dataset.path} has {there} classes")


def last_checkpoint(cfg: DictConfig) -> Path | None:
    """The checkpoint to continue from: the last one of this run, or else `resume`; None for a new run."""
    directory = OmegaConf.select(cfg, "callbacks.checkpoints.directory")
    own = Path(directory) / LAST if directory else None
    if own is not None and own.exists():
        return own
    return find_checkpoint(cfg.resume) if cfg.resume is not None else None


def check_same_stage(path: Path, checkpoint: dict[str, Any], stage_config: dict[str, Any]) -> None:
    """Refuse to continue from a checkpoint of another stage or with another optimizer.

    The learning rate may change, and what changes speed and memory alone.
    """
    stored, present = _what_a_run_keeps(checkpoint["stage_config"]), _what_a_run_keeps(stage_config)
    for part, mine in present.items():
        if stored[part] != mine:
            raise UserError(f"{path} holds another stage: its {part} is {stored[part]}, this run's is {mine}")


def _what_a_run_keeps(stage_config: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {
        part: stage_config.get(part) or {} for part in ("denoiser", "corruption", "optimizer")
    }
    network = _without(parts["denoiser"].get("network") or {}, "checkpoint_levels")
    return parts | {
        "denoiser": parts["denoiser"] | {"network": network},
        "optimizer": _without(parts["optimizer"], "lr", "fused"),
    }


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}


def train(cfg: DictConfig) -> DiffusionStage:
    """Build everything, continue from a checkpoint if there is one, and fit."""
    stage_config = cast(dict[str, Any], OmegaConf.to_container(cfg.stage, resolve=True))
    quiet_lightning()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data: ImageDataModule = instantiate(cfg.data, _convert_="all")
    check_classes(data, cfg.network.num_classes)
    checkpoint = last_checkpoint(cfg)
    if checkpoint is not None:
        content = read_checkpoint(checkpoint)
        check_same_stage(checkpoint, content, stage_config)
        if content["images_seen"] >= cfg.trainer.max_images:
            raise UserError(
                f"{os.path.relpath(checkpoint)} has seen {content['images_seen']:,} images already: nothing to do "
                f"unless trainer.max_images={cfg.trainer.max_images} grows"
            )
    stage: DiffusionStage = instantiate(cfg.stage, _convert_="all")
    stage.stage_config, stage.class_names = stage_config, data.dataset.class_names
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=list(instantiate(cfg.callbacks, _convert_="all").values()),
        logger=list(instantiate(cfg.logger, _convert_="all").values()),
        _convert_="all",
    )
    if trainer.is_global_zero:
        write_config(cfg, cfg.run_dir)
        parameters = sum(p.numel() for p in stage.denoiser.parameters())
        where = f"continues {os.path.relpath(checkpoint)}" if checkpoint else "new run"
        images = len(data.dataset.names)
        print(f"{os.path.relpath(cfg.run_dir)}: {where}, {parameters:,} parameters, {images:,} images", flush=True)
    trainer.fit(stage, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        print(f"trained on {stage.images_seen:,} images; all is in {os.path.relpath(cfg.run_dir)}")
    return stage
