"""From a validated config to a trained stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from relay_diffusion.checkpoints.loading import check_loadable, read_checkpoint
from relay_diffusion.checkpoints.reading import KEPT, LAST, find_checkpoint, find_stage, read_stage, stored_weights
from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.errors import UserError, naming
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.preemption import leave_if_preempted, preempted
from relay_diffusion.training.callbacks.stopping import why_stopped
from relay_diffusion.training.run_record import KEY, RunRecord, changes, changes_data_order
from relay_diffusion.utils.differences import first_difference
from relay_diffusion.utils.distributed import leave_group, on_rank_zero, started_ranks
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.git import git_revision
from relay_diffusion.utils.host import report_slow_settings
from relay_diffusion.utils.quiet import quiet_libraries


def check_classes(data: ImageDataModule, num_classes: int) -> None:
    """Refuse a network whose classes are not those of the data."""
    there = data.dataset.num_classes
    if num_classes and num_classes != there:
        otherwise = "" if there else " (folders become classes by python -m relay_diffusion.cli.convert_images)"
        raise UserError(
            f"network.num_classes={num_classes}, but {data.dataset.path} has {there} classes: use "
            f"network.num_classes={there}{otherwise}"
        )


def check_can_be_loaded(stage_config: dict[str, Any], trusted: Sequence[str]) -> None:
    """Refuse a stage that could be trained, but not loaded from its checkpoint."""
    try:
        check_loadable(stage_config, trusted, Path(LAST))
    except UserError as error:
        raise UserError(f"stage: its checkpoint could not be loaded: {error}") from None


@dataclass(frozen=True)
class Start:
    """Where a run starts, as rank 0 decides it.

    checkpoint: the file to continue from; None for a new run. own: it is of this run, and not `resume`. wandb: what
    its W&B run continues from.
    """

    checkpoint: Path | None = None
    own: bool = False
    images_seen: int = 0
    changed: list[tuple[str, str, str]] = field(default_factory=list)
    wandb: dict[str, str] | None = None


def last_checkpoint(cfg: DictConfig) -> tuple[Path, dict[str, Any], bool] | None:
    """The checkpoint to continue from, its content, and whether it is this run's own; None for a new run.

    It is the last one of this run, or else `resume`.

    One of this run that is damaged is passed over, with a warning, for the one before.
    Raises UserError if none of those that are there can be read.
    """
    directory = OmegaConf.select(cfg, "callbacks.checkpoints.directory")
    own = [Path(directory) / LAST, *sorted(Path(directory).glob(KEPT), reverse=True)] if directory else []
    failures = []
    for path in own:
        if path.exists():
            try:
                return path, read_checkpoint(path, cfg.trusted), True
            except UserError as error:
                failures.append(str(error))
                print(f"warning: {error}; trying the checkpoint before", file=sys.stderr, flush=True)
    if failures:
        raise UserError(f"no checkpoint in {directory} can be read: delete them to begin anew ({failures[0]})")
    if cfg.resume is None:
        return None
    with naming("resume"):
        return find_checkpoint(cfg.resume), read_checkpoint(cfg.resume, cfg.trusted), False


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


def find_start(cfg: DictConfig, data: ImageDataModule, record: dict[str, Any]) -> Start:
    """Decide where the run starts, on one rank.

    `record`: of this run, to compare with. Of the checkpoint nothing stays in memory: Lightning reads it again.
    Raises UserError for a checkpoint that this run cannot continue.
    """
    found = last_checkpoint(cfg)
    if found is None:
        return Start()
    path, content, own = found
    check_same_stage(path, content, record["config"]["stage"])
    check_same_classes(path, content, data)
    seen = content["images_seen"]
    if not own and seen >= cfg.trainer.max_images:
        raise UserError(
            f"resume={os.path.relpath(path)} has seen {seen:,} images already: raise "
            f"trainer.max_images={cfg.trainer.max_images} to continue it"
        )
    stored = content.get(KEY, {}).get("wandb") if own else None
    return Start(path, own, seen, changes(content, record, data), stored)


@quiet_libraries()
def train(cfg: DictConfig) -> DiffusionStage | None:
    """Build everything, continue from a checkpoint if there is one, and fit; None if nothing is left to train."""
    stage_config = cast(dict[str, Any], OmegaConf.to_container(cfg.stage, resolve=True))
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data: ImageDataModule = instantiate(cfg.data, _convert_="all")
    check_classes(data, cfg.network.num_classes)
    test_steps = int(cfg.trainer.get("fast_dev_run", False))
    stage: DiffusionStage = instantiate(cfg.stage, _convert_="all")
    check_can_be_loaded(stage_config, cfg.trusted)
    stage.stage_config, stage.class_names = stage_config, data.dataset.class_names
    record = RunRecord(cfg)
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=[*instantiate(cfg.callbacks, _convert_="all").values(), record],
        logger=[] if test_steps else list(instantiate(cfg.logger, _convert_="all").values()),
        _convert_="all",
    )
    with started_ranks(trainer, str(cfg.run_id), cfg.run_dir, "run_dir"):
        start = Start()
        if not test_steps:
            start = on_rank_zero(trainer, lambda: find_start(cfg, data, record.of(trainer, data)))
        if start.own and start.images_seen >= cfg.trainer.max_images:
            if trainer.is_global_zero:
                print(
                    f"{os.path.relpath(cfg.run_dir)}: training is complete ({start.images_seen:,} images seen); "
                    "raise trainer.max_images to continue"
                )
            return None
        if start.checkpoint is not None and not start.checkpoint.is_file():
            raise UserError(f"{start.checkpoint} is not on this host: run_dir must be on a file system of all hosts")
        begun = begin_with(stage, cfg.init) if start.checkpoint is None and cfg.init is not None else None
        if trainer.is_global_zero:
            _announce(cfg, trainer, stage, data, start, begun)
        trainer.fit(stage, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
    if stage.images_seen < cfg.trainer.max_images and preempted(trainer):
        leave_group()  # all ranks are here
        leave_if_preempted(trainer)
    if test_steps and stage.nonfinite_steps.now():
        raise UserError("trainer.fast_dev_run: the last step had no finite loss, or no finite gradient")
    if trainer.is_global_zero:
        print(_how_it_ended(cfg, trainer, stage))
    return stage


def _how_it_ended(cfg: DictConfig, trainer: L.Trainer, stage: DiffusionStage) -> str:
    """The last line of a run."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return f"trainer.fast_dev_run: trained on {stage.images_seen:,} images as a test, without checkpoint and log"
    done, where = f"{stage.images_seen:,}", os.path.relpath(cfg.run_dir)
    if cfg.trainer.get("profiler"):
        where += ", times in fit-profile*.txt"
    reason = why_stopped(trainer) if stage.images_seen < cfg.trainer.max_images else ""
    if reason:
        return f"stopped early ({reason}): trained on {done} of {cfg.trainer.max_images:,} images; all is in {where}"
    return f"trained on {done} images; all is in {where}"


def _announce(
    cfg: DictConfig,
    trainer: L.Trainer,
    stage: DiffusionStage,
    data: ImageDataModule,
    start: Start,
    begun: Path | None,
) -> None:
    """Record the run in its directory and loggers, and print how it starts."""
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_text(Path(cfg.run_dir) / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    settings, revision = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)), git_revision()
    for logger in trainer.loggers:
        if hasattr(logger, "continue_run"):
            logger.continue_run(start.wandb)
        logger.log_hyperparams(settings | ({"git": revision} if revision else {}))
    parameters = sum(p.numel() for p in stage.denoiser.parameters())
    how = "new run" if begun is None else f"new run with the weights of {os.path.relpath(begun)}"
    if start.checkpoint is not None:
        changed = ", ".join(f"{key} {before} -> {now}" for key, before, now in start.changed)
        how = f"continues {os.path.relpath(start.checkpoint)}{f' with {changed}' if changed else ''}"
    images = len(data.dataset.names)
    print(f"{os.path.relpath(cfg.run_dir)}: {how}, {parameters:,} parameters, {images:,} images", flush=True)
    if order := changes_data_order(start.changed):
        print(f"note: {', '.join(order)} changed, so images come in another order than before", flush=True)
    report_slow_settings(trainer.strategy.root_device, {"network.channels_last": stage.denoiser.network})
