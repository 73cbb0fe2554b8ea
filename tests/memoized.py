"""Results that nearly every test needs, computed once per process: composed configs and FLOPs of networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from relay_diffusion.networks.unet import UNet
from support import PROJECT

CONF = PROJECT / "conf"


@lru_cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def _chooses(override: str) -> bool:
    """Whether an override chooses a file of conf/, so that it cannot be applied to a composed config."""
    group = override.lstrip("+~").partition("=")[0].partition("@")[0]
    return group.startswith("hydra") or (CONF / group).is_dir()


def composed(name: str, *overrides: str) -> DictConfig:
    """Compose a config as the command line does; the files of conf/ are read once for the same choices."""
    cfg = copy.deepcopy(_composed(name, tuple(filter(_chooses, overrides))))
    values = [override for override in overrides if not _chooses(override)]
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), cfg)
    return cfg


def memoized_flops(count: Callable[..., int]) -> Callable[..., int]:
    """Count the FLOPs of equal networks once."""
    counted: dict[tuple[object, ...], int] = {}

    def flops(network: UNet, **options: int) -> int:
        shapes = tuple(weight.shape for weight in network.parameters())
        key = (repr(network), network.size, network.condition_channels, shapes, *sorted(options.items()))
        if key not in counted:
            counted[key] = count(network, **options)
        return counted[key]

    return flops
