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


def _fused_optimizer(precision: str) -> bool:
    """False for fp16: its loss scaling finds infinite gradients before they are replaced, a fused step would after."""
    return not str(precision).startswith("16")


def register_resolvers() -> None:
    """Make the project's resolvers known to OmegaConf; calling it again changes nothing."""
    resolvers: dict[str, Callable[..., Any]] = {
        "new_run_id": _new_run_id,
        "run_dir": _run_dir,
        "wandb_offline": _wandb_offline,
        "text": str,
        "fused_optimizer": _fused_optimizer,
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


def _check_complete(cfg: DictConfig, besides: str = "-") -> None:
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if not key.startswith(besides))
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
    fused = OmegaConf.select(cfg, "stage.optimizer.fused", default=False)
    _require(
        not fused or _fused_optimizer(cfg.trainer.precision),
        f"stage.optimizer.fused={fused} does not go with trainer.precision={cfg.trainer.precision}, whose infinite "
        "gradients are to be seen first: use stage.optimizer.fused=false or trainer.precision=bf16-mixed",
    )
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
    again = cfg.network.checkpoint_levels
    _require(
        isinstance(again, ListConfig) and all(level in range(levels) for level in again),
        f"network.checkpoint_levels={again}: must be a list of levels, 0 to {levels - 1}, e.g. [0]",
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
    augmented, augment_labels = cfg.stage.augment is not None, cfg.network.augment_labels
    _require(
        augmented == (augment_labels > 0),
        f"network.augment_labels={augment_labels}, but stage.augment is {'set' if augmented else 'null'}: "
        "use augment=edm, or augment=none",
    )
    mirrored = augmented and OmegaConf.select(cfg, "stage.augment.x_flip", default=False)
    _require(
        not (mirrored and cfg.data.dataset.x_flip),
        "data.dataset.x_flip=true mirrors images that stage.augment mirrors too: set one of them to false",
    )
    interval = cfg.stage.guidance_interval
    _require(
        interval is None or cfg.stage.guidance_scale != 1,
        f"stage.guidance_interval={interval} has no use with stage.guidance_scale=1, which is no guidance",
    )
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


def chosen_stages(relay: DictConfig) -> dict[str, DictConfig]:
    """The stages to run, by name, in order: from `relay.first` to `relay.last`; with `relay.start` from the second.

    Raises UserError for a name that is no stage, and where first, last and start contradict each other.
    """
    names = [str(name) for name in relay.stages]
    _require(len(names) > 0, "relay.stages is empty: a relay needs at least a first stage")
    for key in ("first", "last"):
        _require(relay[key] is None or relay[key] in names, f"relay.{key}={relay[key]}: the stages are {names}")
    start, first, last = relay.start is not None, relay.first, relay.last
    _require(
        start or first in (None, names[0]),
        f"relay.first={first}: relay.start=FOLDER must give the images that it starts from",
    )
    _require(not start or len(names) > 1 or first is not None, "relay.start: the relay has no second stage")
    begin = names.index(first) if first is not None else int(start)
    end = names.index(last) if last is not None else len(names) - 1
    _require(begin <= end, f"relay.last={last} comes before the first stage to run, {names[begin]}")
    return {name: relay.stages[name] for name in names[begin : end + 1]}


def _check_relay(cfg: DictConfig) -> None:
    relay = cfg.relay
    stages = chosen_stages(relay)
    for name, stage in stages.items():
        _require(
            not OmegaConf.is_missing(stage, "path"),
            f"relay.stages.{name}.path has no value: give it on the command line, relay.stages.{name}.path=...",
        )
        check_file(stage.path, f"relay.stages.{name}.path")
        if stage.guide is not None:
            check_file(stage.guide, f"relay.stages.{name}.guide")
    if relay.start is not None:
        check_file(relay.start, "relay.start")
    _require(relay.rounding in ("nearest", "floor"), f"relay.rounding={relay.rounding}: use nearest or floor")
    if relay.hand_over_sigma is not None:
        _number(cfg, "relay.hand_over_sigma", 0)
        _require(
            relay.start is None, "relay.hand_over_sigma is for a stage that starts from noise, not for relay.start"
        )


def validate_sampling(cfg: DictConfig) -> None:
    """Raise UserError for the first thing in a sample config that cannot work."""
    _check_complete(cfg, besides="relay.stages.")
    _check_devices(cfg)
    _number(cfg, "batch_size", 1, whole=True)
    _number(cfg, "picture", 0, whole=True)
    _require(cfg.mode in ("sample", "evaluate"), f"mode={cfg.mode}: use sample or evaluate")
    _require(cfg.format in ("png", "zip"), f"format={cfg.format}: use png or zip")
    _require(isinstance(cfg.npz, bool), f"npz={cfg.npz}: use true or false")
    if cfg.images is not None:
        _require(cfg.mode == "evaluate", f"images={cfg.images} are only measured: add mode=evaluate")
        for key in ("seeds", "class"):
            _require(cfg[key] is None, f"{key}={cfg[key]} is for sampling: images={cfg.images} are only measured")
        _require(cfg.format == "png" and not cfg.npz, f"images={cfg.images} are only measured: no format or npz")
        _require(cfg.reference is not None, f"images={cfg.images}: give reference=... to compare them with")
        check_file(cfg.images, "images")
    else:
        _check_relay(cfg)
    if cfg.mode == "evaluate":
        path, key = reference_of(cfg)["path"], "relay.reference.path" if cfg.reference is None else "reference"
        _require(path is not None, "mode=evaluate compares with a reference: give reference=FOLDER, ZIP or NPZ")
        check_file(path, key)


def reference_of(cfg: DictConfig) -> dict[str, Any]:
    """path and subset of what mode=evaluate compares with: `reference`, or else the relay's own."""
    if cfg.reference is not None:
        return {"path": cfg.reference, "subset": ""}
    return {"path": cfg.relay.reference.path, "subset": cfg.relay.reference.subset}
