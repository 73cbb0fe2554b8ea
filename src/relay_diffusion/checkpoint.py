"""Checkpoints and exported stages: found, read without running anything in them, and turned into objects again."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from relay_diffusion.errors import UserError
from relay_diffusion.files import file_sha256, parse_json

LAST = "last.ckpt"
KEPT = "images-*.ckpt"  # earlier ones, with the images they have seen in twelve digits
EXPORT_STAGE, EXPORT_WEIGHTS = "stage.json", "weights.safetensors"  # the files of an exported stage
EXPORT_FORMAT = 1
TRUSTED = ("relay_diffusion.",)  # the packages whose classes a checkpoint may name


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint file for `path`: itself, or the last one of a run directory. Raises UserError if there is none."""
    path = Path(path)
    candidates = [path] if not path.is_dir() else [path / LAST, path / "checkpoints" / LAST]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"no checkpoint at {path}: give a .ckpt file or the directory of a training run")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, tensors and plain values only. Raises UserError naming the file."""
    file = find_checkpoint(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # said in our words below
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise UserError(
            f"{file} cannot be read as a checkpoint: it is damaged, no checkpoint, "
            "or holds more than tensors and plain values, which is refused (published .pkl and .pt files are converted "
            "first: python -m relay_diffusion.interop.convert)"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("stage_config"), dict):
        raise UserError(f"{file} is not a checkpoint of a diffusion stage: it holds no stage_config")
    return content


def find_stage(path: str | Path) -> Path:
    """What holds a stage at `path`: the stage.json of an export, or else a checkpoint as find_checkpoint finds it."""
    path = Path(path)
    if (path / EXPORT_STAGE).is_file():
        return path / EXPORT_STAGE
    if (path / EXPORT_WEIGHTS).is_file():
        raise UserError(f"{path} is no whole export, {EXPORT_STAGE} is missing: export again")
    return find_checkpoint(path)


def read_stage(file: Path) -> dict[str, Any]:
    """The content of a checkpoint, or of an export in the shape of one, on the CPU. Raises UserError naming the file.

    Keys: stage_config; state_dict (of the stage), ema (a dictionary with weights) or both; class_names, images_seen.
    """
    return _read_export(file) if file.name == EXPORT_STAGE else read_checkpoint(file)


def _read_export(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if content["format"] != EXPORT_FORMAT:
            raise UserError(f"{file} is an export in format {content['format']!r}: this version reads {EXPORT_FORMAT}")
        kind, sha256 = content["weights"]["kind"], content["weights"]["sha256"]
        read = {key: content[key] for key in ("stage_config", "class_names", "images_seen")}
        kinds = {"stage_config": dict, "class_names": list, "images_seen": int}
        if kind not in ("raw", "ema") or not all(isinstance(read[key], kinds[key]) for key in kinds):
            raise TypeError
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file} cannot be read as an exported stage: it is damaged or none; export again") from None
    weights = _read_export_weights(file.with_name(EXPORT_WEIGHTS), sha256)
    if kind == "ema":
        return read | {"ema": {"weights": weights}}
    return read | {"state_dict": {f"denoiser.{name}": tensor for name, tensor in weights.items()}}


def _read_export_weights(file: Path, sha256: str) -> dict[str, Tensor]:
    try:
        if file_sha256(file) != sha256:
            raise UserError(
                f"{file} does not hold the weights that {EXPORT_STAGE} describes: fetch or export both again"
            )
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: it belongs to {EXPORT_STAGE} beside it") from None
    except (OSError, SafetensorError):
        raise UserError(f"{file} cannot be read: it is damaged; export again") from None


def _check_targets(node: Any, trusted: tuple[str, ...], file: Path) -> None:
    """Refuse a stored config that would call anything but a class of the trusted packages."""
    if isinstance(node, str) and "${" in node:
        raise UserError(f"{file} holds a config with an interpolation ({node[:60]}): refused")
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if target is not None:
            if not (isinstance(target, str) and target.startswith(trusted)):
                raise UserError(f"{file} names {target!r}, which is not a class of {' or '.join(trusted)}: refused")
            try:
                found = get_class(target)
            except Exception:
                raise UserError(f"{file} names the class {target}, which does not exist here") from None
            if not found.__module__.startswith(tuple(t.rstrip(".") for t in trusted)):
                raise UserError(f"{file} names {target}, which leads outside {' or '.join(trusted)}: refused")
        for value in node.values():
            _check_targets(value, trusted, file)
    elif isinstance(node, list | tuple):
        for value in node:
            _check_targets(value, trusted, file)


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any] | None, file: Path) -> dict[str, Any]:
    """A stored config with some values replaced; nulls in `changes` change nothing.

    `changes` has the shape of the config. Raises UserError if it names something that is not there.
    """
    stored = OmegaConf.create(dict(config))
    OmegaConf.set_struct(stored, True)
    try:
        merged = OmegaConf.merge(stored, _without_nulls(changes or {}))
    except OmegaConfBaseException as error:
        raise UserError(f"changes to the stage of {file}: {str(error).splitlines()[0]}") from None
    return cast(dict[str, Any], OmegaConf.to_container(merged))


def build_stored(config: Mapping[str, Any], file: Path, trusted: tuple[str, ...] = TRUSTED) -> Any:
    """Build the object of a stored config. Raises UserError for a class that is not trusted or that refuses."""
    _check_targets(config, trusted, file)
    try:
        return instantiate(OmegaConf.create(dict(config)), _convert_="all")
    except InstantiationException as error:
        raise UserError(f"the stage of {file} cannot be built: {error.__cause__ or error}") from None


def _without_nulls(changes: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in changes.items():
        if isinstance(value, Mapping):
            kept[key] = _without_nulls(value)
        elif value is not None:
            kept[key] = value
    return kept
