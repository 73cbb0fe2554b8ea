"""Configuration: resolvers, and checks before anything is built. Imports neither torch nor lightning."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from relay_diffusion.errors import UserError
from relay_diffusion.files import write_text

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
RUN_ID = "RELAY_DIFFUSION_RUN_ID"  # hands rank 0's choice to the processes that it starts


def _sweep_job() -> Any:
    """Hydra's settings of this job, if it is one of a sweep (--multirun)."""
    if not HydraConfig.initialized():
        return None
    settings = HydraConfig.get()
    return settings if settings.mode == RunMode.MULTIRUN else None


def _launcher_id() -> str | None:
    """What all ranks of a job started by SLURM or torchrun share; None for a run started by hand."""
    command = hashlib.sha256("\0".join(sys.argv).encode()).hexdigest()[:4]  # one job may run several commands
    if "SLURM_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_JOB_ID']}-{command}"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    if os.environ["TORCHELASTIC_RUN_ID"] != "none":
        return f"{os.environ['TORCHELASTIC_RUN_ID']}-{command}"
    parent = Path(f"/proc/{os.getppid()}")
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE") or not parent.exists():
        raise UserError("the processes of this run share no id: give run_id=NAME, or torchrun --rdzv-id=NAME")
    return f"torchrun-{os.getppid()}-{int(parent.stat().st_ctime)}"


def _new_run_id() -> str:
    """One id for all ranks: from the process that started this one, the launcher, or else the time."""
    given = os.environ.get(RUN_ID) or _launcher_id()
    os.environ[RUN_ID] = given or f"{time.strftime('%H%M%S')}-{secrets.token_hex(2)}"
    job = _sweep_job()
    return os.environ[RUN_ID] if job is None else f"{os.environ[RUN_ID]}-{job.job.num}"


def _run_dir(root: str, run_id: str) -> str:
    """`root`/<date>/<run id>; the directory of an earlier day, if the run began then; a sweep's own directory."""
    job = _sweep_job()
    if job is not None:
        return str(job.runtime.output_dir)
    earlier = sorted(Path(root).glob(f"*/{run_id}"))
    return str(earlier[-1] if earlier else Path(root) / time.strftime("%Y-%m-%d") / str(run_id))


def _wandb_offline() -> bool:
    """Whether no Weights & Biases account is set up here."""
    if os.environ.get("WANDB_API_KEY"):
        return False
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc().authenticators(host) is None
    except (OSError, NetrcParseError):
        return True


def register_resolvers() -> None:
    """Make the project's resolvers known to OmegaConf; calling it again changes nothing."""
    resolvers: dict[str, Callable[..., Any]] = {
        "new_run_id": _new_run_id,
        "run_dir": _run_dir,
        "wandb_offline": _wandb_offline,
        "text": str,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def write_config(cfg: DictConfig, directory: str) -> None:
    """Note the resolved config of a run in `directory`/config.yaml."""
    write_text(Path(directory) / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _number(cfg: DictConfig, key: str, low: float, high: float = float("inf"), whole: bool = False) -> None:
    value = OmegaConf.select(cfg, key)
    kinds = int if whole else int | float
    valid = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
    bounds = f"between {low:g} and {high:g}" if high < float("inf") else f"at least {low:g}"
    _require(valid, f"{key}={value}: must be a {'whole ' if whole else ''}number, {bounds}")


def _check_complete(cfg: DictConfig, unused: str = "-") -> None:
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if not key.startswith(unused))
    if missing:
        raise UserError(f"{missing[0]} has no value: give it on the command line, {missing[0]}=...")


def _check_devices(cfg: DictConfig) -> None:
    trainer = cfg.trainer
    _number(cfg, "trainer.num_nodes", 1, whole=True)
    _require(
        trainer.precision in PRECISIONS, f"trainer.precision={trainer.precision}: use one of {', '.join(PRECISIONS)}"
    )
    devices = trainer.devices
    _require(
        devices == "auto" or (devices >= 1 if isinstance(devices, int) else len(devices) > 0),
        f"trainer.devices={devices}: must be at least 1, a list of device numbers, or auto",
    )


def world_size(devices: Any, num_nodes: int) -> int | None:
    """Processes of a run, where the configuration alone tells; None if it depends on the machine ("auto")."""
    if isinstance(devices, int):
        return devices * num_nodes
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices) * num_nodes
    return None


def check_file(path: Any, key: str) -> None:
    """Raise UserError naming the option `key`, if there is nothing at `path`."""
    _require(Path(str(path)).exists(), f"{key}={path}: no such file or folder (relative paths start at {Path.cwd()})")


def validate_training(cfg: DictConfig) -> None:
    """Raise UserError for the first thing in a train config that cannot work."""
    _check_complete(cfg)
    _check_devices(cfg)
    for key in ("resolution", "trainer.max_images", "data.batch_size", "data.accumulate"):
        _number(cfg, key, 1, whole=True)
    for key in ("network.channels", "network.blocks"):
        _number(cfg, key, 1, whole=True)
    for name, callback in cfg.callbacks.items():
        if "every_n_images" in callback:
            _number(cfg, f"callbacks.{name}.every_n_images", 0, whole=True)
    for key in ("network.dropout", "stage.label_dropout"):
        _number(cfg, key, 0, 1)
    _number(cfg, "stage.warmup_images", 0)
    _number(cfg, "stage.optimizer.lr", 0)
    _number(cfg, "network.num_classes", 0, whole=True)
    mult = cfg.network.channel_mult
    _require(
        isinstance(mult, ListConfig) and len(mult) > 0 and all(isinstance(m, int) and m > 0 for m in mult),
        f"network.channel_mult={mult}: must be a list of whole numbers, one a level, e.g. [1,2,2]",
    )
    _require(cfg.network.image_channels == 3, f"network.image_channels={cfg.network.image_channels}: images have 3")
    levels = len(mult)
    _require(
        cfg.resolution % 2 ** (levels - 1) == 0,
        f"resolution={cfg.resolution} is not divisible by 2^{levels - 1}, as network.channel_mult with {levels} levels "
        "demands",
    )
    block = OmegaConf.select(cfg, "stage.corruption.block", default=1)
    _require(
        isinstance(block, int) and block >= 1, f"stage.corruption.block={block}: must be a whole number, at least 2"
    )
    _require(
        cfg.resolution % block == 0,
        f"resolution={cfg.resolution} is not divisible by stage.corruption.block={block}",
    )
    prob_length = OmegaConf.select(cfg, "stage.corruption.schedule.prob_length", default=1)
    _require(
        0 < prob_length <= 1,
        f"stage.corruption.schedule.prob_length={prob_length}: training needs (0, 1]",
    )
    conditional = cfg.network.num_classes > 0
    _require(
        conditional or cfg.stage.guidance_scale == 1,
        f"stage.guidance_scale={cfg.stage.guidance_scale} needs classes, but network.num_classes is 0",
    )
    _require(
        conditional or cfg.stage.label_dropout == 0,
        f"stage.label_dropout={cfg.stage.label_dropout} needs classes, but network.num_classes is 0",
    )
    check_file(cfg.data.dataset.path, "data.dataset.path")
    world = world_size(cfg.trainer.devices, cfg.trainer.num_nodes)
    if world is not None:
        parts = world * cfg.data.accumulate
        _require(
            cfg.data.batch_size % parts == 0,
            f"data.batch_size={cfg.data.batch_size} does not divide over {world} devices x data.accumulate="
            f"{cfg.data.accumulate}: {max(parts, cfg.data.batch_size // parts * parts)} would",
        )


def validate_sampling(cfg: DictConfig) -> None:
    """Raise UserError for the first thing in a sample config that cannot work."""
    _check_complete(cfg, unused="-" if cfg.mode == "evaluate" else "metrics.")
    _check_devices(cfg)
    _number(cfg, "batch_size", 1, whole=True)
    _number(cfg, "picture", 0, whole=True)
    _require(cfg.mode in ("sample", "evaluate"), f"mode={cfg.mode}: use sample or evaluate")
    _require(len(cfg.relay.stages) > 0, "relay.stages is empty: a relay needs at least a first stage")
    for name, stage in cfg.relay.stages.items():
        check_file(stage.path, f"relay.stages.{name}.path")
    if cfg.mode == "evaluate":
        check_file(cfg.metrics.reference.path, "metrics.reference.path")
