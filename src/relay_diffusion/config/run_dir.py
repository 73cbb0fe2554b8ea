"""OmegaConf resolvers for run directories and run ids."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import time
from collections.abc import Callable
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from relay_diffusion.config.checks import check_run_id
from relay_diffusion.config.train import fused_optimizer
from relay_diffusion.errors import UserError
from relay_diffusion.utils.distributed import RUN_ID


def sweep_job() -> Any:
    """Return Hydra's settings of a sweep job (--multirun), else None."""
    if not HydraConfig.initialized():
        return None
    settings = HydraConfig.get()
    return settings if settings.mode == RunMode.MULTIRUN else None


def _launcher_id() -> str | None:
    """Return the id that a launcher gives all ranks, else None.

    Launchers: `wandb agent`, SLURM and torchrun.
    """
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        return os.environ["WANDB_RUN_ID"]  # of `wandb agent`, under which W&B takes no other id
    command = hashlib.sha256("\0".join(sys.argv).encode()).hexdigest()[:4]  # a job may run several commands
    if "SLURM_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_JOB_ID']}-{command}"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    if os.environ["TORCHELASTIC_RUN_ID"] != "none":
        return f"{os.environ['TORCHELASTIC_RUN_ID']}-{command}"
    parent = Path(f"/proc/{os.getppid()}")
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE") or not parent.exists():
        raise UserError("run_id: the processes have no common id; give run_id=NAME, or torchrun --rdzv-id=NAME")
    return f"torchrun-{os.getppid()}-{int(parent.stat().st_ctime)}"


def _new_run_id() -> str:
    """Return one id for all ranks: from rank 0, the launcher or the time."""
    run_id = os.environ.get(RUN_ID) or _launcher_id() or f"{time.strftime('%H%M%S')}-{secrets.token_hex(2)}"
    job = sweep_job()
    return run_id if job is None or RUN_ID in os.environ else f"{run_id}-{job.job.num}"


def _run_dir(root: str, run_id: str) -> str:
    """Return `root`/<date>/<run id>, or the directory of a sweep job.

    A run that started on an earlier day keeps its directory.
    """
    job = sweep_job()
    if job is not None:
        return str(job.runtime.output_dir)
    check_run_id(run_id)
    earlier = sorted(day / str(run_id) for day in Path(root).glob("*/") if (day / str(run_id)).is_dir())
    return str(earlier[-1] if earlier else Path(root) / time.strftime("%Y-%m-%d") / str(run_id))


def wandb_offline() -> bool:
    """Return whether no Weights & Biases account is configured."""
    if os.environ.get("WANDB_API_KEY"):
        return False
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc().authenticators(host) is None
    except (OSError, NetrcParseError):
        return True


def _group_choices() -> str:
    """List the config groups of this command with their choices."""
    loader = GlobalHydra.instance().config_loader()
    groups = sorted(group for group in HydraConfig.get().runtime.choices if not group.startswith("hydra/"))
    return "\n".join(f"{group}: {', '.join(loader.get_group_options(group.partition('@')[0]))}" for group in groups)


def register_resolvers() -> None:
    """Register the resolvers with OmegaConf. Repeated calls have no effect."""
    resolvers: dict[str, Callable[..., Any]] = {
        "run_dir": _run_dir,
        "wandb_offline": wandb_offline,
        "group_choices": _group_choices,
        "text": str,
        "fused_optimizer": fused_optimizer,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    # cached per config, so that all settings of a run share one id
    OmegaConf.register_new_resolver("new_run_id", _new_run_id, replace=True, use_cache=True)
