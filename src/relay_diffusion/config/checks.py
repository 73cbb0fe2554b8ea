"""Checks of single options. Each raises UserError naming the key."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relay_diffusion.checkpoints.hub import check_address, is_address
from relay_diffusion.errors import UserError, prefix_errors, require
from relay_diffusion.utils.messages import shorten
from relay_diffusion.utils.resolution import MAX_SIDE, image_size

MAKE_DATA = "; for the data sets of this project see the table in docs/training.md"  # remedy if one is missing
HUGE = 1e12  # larger numbers are typos
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
_ABSENT = object()
READ_BY_HYDRA = ("_target_", "_partial_", "_recursive_")


def selected(cfg: DictConfig, key: str, absent: Any = None) -> Any:
    """Return the value of `key`, or `absent` without such a key."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            return absent
        try:
            node = node[part]
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: {shorten(str(error).partition(chr(10))[0])}") from None
    return node


def has_key(cfg: DictConfig, key: str) -> bool:
    """Whether the config has `key`, which may be null."""
    return selected(cfg, key, _ABSENT) is not _ABSENT


def is_whole(value: Any) -> bool:
    """Whether a value is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is an integer, or a float other than nan."""
    return is_whole(value) or (isinstance(value, float) and not math.isnan(value))


def check_number(cfg: DictConfig, key: str, low: float, high: float) -> None:
    """Require a number from low to high."""
    value = selected(cfg, key)
    valid = is_number(value) and low <= value <= high
    require(valid, f"{key}={shorten(value)}: must be a number, between {low:g} and {high:g}")


def check_whole(cfg: DictConfig, key: str, low: int, high: int) -> None:
    """Require an integer from low to high."""
    value = selected(cfg, key)
    bounds = f"between {low} and {high}" if is_whole(value) and value > high else f"at least {low}"
    bounds += f": write {value:.0f}" if isinstance(value, float) and value.is_integer() and low <= value <= high else ""
    valid = is_whole(value) and low <= value <= high
    require(valid, f"{key}={shorten(value)}: must be a whole number, {bounds}")


def check_resolution(cfg: DictConfig, key: str) -> None:
    """Require a number of pixels, or [height, width]."""
    value = selected(cfg, key)
    if not isinstance(value, ListConfig):
        check_whole(cfg, key, 1, MAX_SIDE)
    try:
        image_size(list(value) if isinstance(value, ListConfig) else value, key)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_flag(cfg: DictConfig, key: str) -> None:
    """Require true or false."""
    value = selected(cfg, key)
    require(isinstance(value, bool), f"{key}={shorten(value)}: use true or false")


def check_run_id(run_id: Any) -> None:
    """Require the name of one directory.

    No quotes: Hydra quotes it on the command lines of other ranks.
    """
    named = isinstance(run_id, str | float) or (isinstance(run_id, int) and abs(run_id) < 10**100)
    text = str(run_id) if named else ""
    valid = text.isprintable() and text not in ("", ".", "..") and not set(text) & set("/\\\"'")
    require(
        valid and len(text.encode()) <= 200,
        f"run_id={shorten(run_id)!a}: must be the name of one directory: at most 200 bytes, no slashes, no quotes",
    )


def check_subset(cfg: DictConfig, key: str) -> None:
    """Require a folder name inside an image set, or "" for all."""
    value = selected(cfg, key)
    require(isinstance(value, str), f"{key}={shorten(value)}: must be the name of a folder inside the image set")


def check_choice(cfg: DictConfig, key: str, choices: tuple[str, ...]) -> None:
    """Require one of a few texts."""
    value = selected(cfg, key)
    known = isinstance(value, str) and value in choices
    listed = ", ".join(choices) if len(choices) > 2 else " or ".join(choices)
    require(known, f"{key}={shorten(value)}: use {'one of ' if len(choices) > 2 else ''}{listed}")


def check_built(cfg: DictConfig, key: str, null: bool = False) -> None:
    """Require a mapping with a `_target_`."""
    value = selected(cfg, key)
    valid = (isinstance(value, DictConfig) and "_target_" in value) or (null and value is None)
    kind = f"a mapping that names its class as _target_{', or null' if null else ''}"
    misplaced = "." in key and has_key(cfg, key.rpartition(".")[2])  # the package of a group's yaml is its name
    hint = f"; does its yaml begin with `# @package {key}`?" if misplaced else ""
    require(valid, f"{key}={shorten(value)}: must be {kind}{hint}")


def check_file(path: Any, key: str, remedy: str = "") -> None:
    """Require an existing file or folder."""
    found = isinstance(path, str | int | float) and _exists(Path(str(path)))
    require(found, f"{key}={shorten(path)}: no such file or folder (relative paths start at {Path.cwd()}){remedy}")


def check_checkpoint(path: Any, key: str) -> None:
    """Require an existing file or folder, or an address on the Hub."""
    if is_address(path):
        with prefix_errors(key):
            check_address(path)
    else:
        check_file(path, key, "; train this stage first, or use another run, .ckpt file or exported folder")


def check_directory(cfg: DictConfig, key: str) -> None:
    """Require a directory that exists or can be created."""
    value = selected(cfg, key)
    text = str(value) if isinstance(value, str | int | float) else ""  # YAML reads 5 as a number
    require(text != "", f"{key}={shorten(value)}: must be the name of a directory")
    path = Path(text)
    for place in (path, *path.parents):
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError):  # too long, or invalid characters
            raise UserError(f"{key}={shorten(ascii(path))}: is not a valid name of a directory; use another") from None
        require(stat.S_ISDIR(mode), f"{key}={shorten(path)}: {shorten(place)} is a file: choose another directory")
        break


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, invalid characters, or no permission
        return False


def check_mapping(cfg: DictConfig, *keys: str) -> None:
    """Require groups of options."""
    for key in keys:
        value = selected(cfg, key)
        require(
            isinstance(value, DictConfig),
            f"{key}={shorten(value)}: is a group of options; set one of them: {key}.NAME=...",
        )


def check_complete(cfg: DictConfig, prefix: str = "", besides: str = "-") -> None:
    """Require a resolvable value for every key, except below `besides`.

    Hydra's keys (`_target_`, ...) must be well-formed. prefix: of the keys of `cfg`, for messages.
    """
    for copied in (False, True):  # plain values first, so that messages name these and not interpolations of them
        for key, value in _leaves(cfg, prefix, copied):
            if value is _ABSENT:
                require(key.startswith(besides), f"{key} has no value; give it on the command line: {key}=...")
            if is_whole(value):  # str() raises for thousands of digits
                require(abs(value) < 10**100, f"{key}: must have at most a hundred digits")
            if isinstance(value, str):
                require(_writable(value), f"{key}={shorten(ascii(value))}: is not valid UTF-8; change it")
            name = key.rpartition(".")[2]
            if name == "_target_":
                named = isinstance(value, str) and all(part.isidentifier() for part in value.split("."))
                require(named and "." in value, f"{key}={shorten(value)}: must be the full name of a class or function")
            elif name in READ_BY_HYDRA:
                require(isinstance(value, bool), f"{key}={shorten(value)}: use true or false")


def _writable(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _leaves(node: DictConfig | ListConfig, prefix: str, copied: bool) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of each leaf.

    copied: yield interpolations instead of plain values. The value of ??? is `_ABSENT`. Hydra's keys are leaves of any
    type. Raises UserError for an interpolation that cannot be resolved.
    """
    parts: list[Any] = list(node) if isinstance(node, DictConfig) else list(range(len(node)))
    for part in parts:
        key = f"{prefix}{part}"
        if OmegaConf.is_interpolation(node, part) and not copied:
            continue
        if OmegaConf.is_missing(node, part):
            yield key, _ABSENT
            continue
        try:
            value = node[part]
        except (OmegaConfBaseException, RecursionError) as error:  # circular interpolations recurse
            raise UserError(f"{key}: {shorten(str(error).partition(chr(10))[0])}") from None
        if OmegaConf.is_interpolation(node, part):
            yield key, value
        elif isinstance(value, DictConfig | ListConfig) and part not in READ_BY_HYDRA:
            yield from _leaves(value, f"{key}.", copied)
        elif not copied:
            yield key, value


def check_devices(cfg: DictConfig) -> None:
    """Check the options of a trainer for devices and precision."""
    check_built(cfg, "trainer")
    check_whole(cfg, "trainer.num_nodes", 1, 2**20)
    check_choice(cfg, "trainer.precision", PRECISIONS)
    if not isinstance(selected(cfg, "trainer.accelerator", "auto"), DictConfig):
        check_choice(cfg, "trainer.accelerator", ACCELERATORS)
    devices = selected(cfg, "trainer.devices")
    numbers = isinstance(devices, ListConfig) and len(devices) > 0 and all(is_whole(d) and d >= 0 for d in devices)
    require(
        devices == "auto" or numbers or (is_whole(devices) and 1 <= devices <= 2**20),
        f"trainer.devices={shorten(devices)}: must be at least 1, a list of device numbers, or auto",
    )


def check_strategy(cfg: DictConfig) -> None:
    """Require a strategy that Lightning knows by name, or a mapping.

    Its backend must be available.
    """
    value = selected(cfg, "trainer.strategy", "auto")
    if isinstance(value, DictConfig):
        _check_backend("trainer.strategy.process_group_backend", value.get("process_group_backend"))
    if isinstance(value, DictConfig) or value == "auto":
        return
    from lightning.pytorch.strategies import StrategyRegistry  # keep --help fast

    known = isinstance(value, str) and value.lower() in StrategyRegistry.available_strategies()
    require(
        known, f"trainer.strategy={shorten(value)}: is unknown; use strategy=single, strategy=ddp or strategy=ddp_cpu"
    )


def _check_backend(key: str, backend: str | None) -> None:
    """Require a backend of torch.distributed, such as nccl or cpu:gloo,cuda:nccl."""
    if backend is None:
        return
    from torch.distributed import is_backend_available  # keep --help fast

    try:
        available = is_backend_available(str(backend))
    except ValueError:  # several backends in another form than DEVICE:BACKEND,...
        available = False
    require(available, f"{key}={shorten(backend)}: is not available; use gloo on CPUs, nccl on GPUs, or null")


def world_size(devices: Any, num_nodes: int) -> int | None:
    """Return the number of processes of a run; None for "auto"."""
    if isinstance(devices, int):
        return devices * num_nodes
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices) * num_nodes
    return None
