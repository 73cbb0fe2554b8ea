"""Checkpoints and exported stages: found, read without running anything in them, and turned into objects again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from torch import Tensor

from relay_diffusion.checkpoints.stored import check_changes, check_finite, check_fits, check_resumable, check_stored
from relay_diffusion.checkpoints.targets import OWN_PACKAGE, package_names, translate_targets
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import file_sha256, parse_json
from relay_diffusion.utils.messages import short

LAST, BEST = "last.ckpt", "best.ckpt"
KEPT = "images-*.ckpt"  # earlier ones, with the images they have seen in twelve digits
EXPORT_STAGE, EXPORT_WEIGHTS = "stage.json", "weights.safetensors"  # the files of an exported stage
EXPORT_FORMAT = 1


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint file for `path`: itself, or the last one of a run directory. Raises UserError if there is none."""
    path = Path(path)
    candidates = [path] if not path.is_dir() else [path / LAST, path / "checkpoints" / LAST]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"no checkpoint at {path}: give a .ckpt file or the directory of a training run")


def read_checkpoint(path: str | Path, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a checkpoint that training can continue from, on the CPU: tensors and plain values only.

    trusted: as for load_stage. Raises UserError naming the file, and the first key or tensor that is wrong.
    """
    file = find_checkpoint(path)
    content = _read(file)
    check_resumable(content, file)
    if "config" in content.get("run", {}):
        content["run"]["config"] = translate_targets(content["run"]["config"])
    described = _described(content["stage_config"], file, trusted)
    if described is not None:
        check_fits(content["state_dict"], described, file)
        if averaged := (content.get("ema") or {}).get("weights"):
            check_fits(averaged, cast(torch.nn.Module, described.denoiser), file, "averaged (ema) ")
    return content


def _described(config: Mapping[str, Any], file: Path, trusted: Sequence[str]) -> torch.nn.Module | None:
    """The stage of a stored config without memory for its weights; None if it is of classes that are not trusted.

    Training builds its own config, and compares the stored one with that.
    """
    try:
        stage = build_empty({key: value for key, value in config.items() if key != "optimizer"}, file, trusted)
    except UserError:
        return None
    if not isinstance(stage, torch.nn.Module):
        raise UserError(f"{file} describes a {type(stage).__name__}, not a stage: it is damaged")
    return stage


def _read(file: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols and of types that are refused below
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # foreign bytes: torch.load raises a dozen types
        raise UserError(
            f"{file} cannot be read as a checkpoint: it is damaged, no checkpoint, "
            "or holds more than tensors and plain values, which is refused (published .pkl and .pt files are converted "
            "first: python -m relay_diffusion.cli.convert_checkpoint)"
        ) from None
    return _translated(check_stored(content, file))


def _translated(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"stage_config": translate_targets(content["stage_config"])}


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
    return _translated(check_stored(_read_export(file), file)) if file.name == EXPORT_STAGE else _read(file)


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
    except UserError:
        raise
    except Exception:  # foreign bytes
        raise UserError(f"{file} cannot be read: it is damaged; export again") from None


def stored_weights(
    content: Mapping[str, Any], kind: str, denoiser: torch.nn.Module, file: Path
) -> Mapping[str, Tensor]:
    """The state dict of a stored stage's denoiser, of `kind` ema or raw.

    `denoiser`: what it is for, which may lie on the meta device. Raises UserError if it is not there, does not fit or
    is not finite.
    """
    states = {
        "raw": {k.removeprefix("denoiser."): v for k, v in content.get("state_dict", {}).items()},
        "ema": content.get("ema", {}).get("weights"),
    }
    if kind not in states:
        raise UserError(f"weights is {kind!r}: use ema or raw")
    state = states[kind]
    if not state:
        raise UserError(f"{file} holds no {kind} weights: use weights={'raw' if kind == 'ema' else 'ema'}")
    check_fits(state, denoiser, file)
    check_finite(state, file)
    return cast(Mapping[str, Tensor], state)


def _inside(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name lies in one of the packages: my_package does not contain my_package_2."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _check_targets(node: Any, packages: Sequence[str], file: Path) -> None:
    """Refuse a stored config that would call anything but a class of the trusted packages."""
    if isinstance(node, str) and "${" in node:
        raise UserError(f"{file} holds a config with an interpolation ({node[:60]}): refused")
    if isinstance(node, Mapping):
        if node.get("_target_") is not None:
            _check_target(node["_target_"], packages, file)
        for value in node.values():
            _check_targets(value, packages, file)
    elif isinstance(node, list | tuple):
        for value in node:
            _check_targets(value, packages, file)


def _check_target(target: Any, packages: Sequence[str], file: Path) -> None:
    if not (isinstance(target, str) and _inside(target, packages)):
        package = target.partition(".")[0] if isinstance(target, str) else ""
        remedy = f"refused; if you trust it, add trusted=[{short(package)}]" if package.isidentifier() else "refused"
        raise UserError(f"{file} names '{short(target)}', which is not a class of {' or '.join(packages)}: {remedy}")
    try:
        found = get_class(target)
    except Exception:
        raise UserError(f"{file} names {short(target)}, which is not a class that can be imported here") from None
    if not _inside(found.__module__, packages):
        raise UserError(
            f"{file} names {short(target)}, which comes from {short(found.__module__)}, outside "
            f"{' or '.join(packages)}: refused"
        )


def check_loadable(stage_config: Mapping[str, Any], trusted: Sequence[str], file: Path) -> None:
    """Raise UserError unless a stage with this config could be loaded from its checkpoint, whose name is `file`.

    The optimizer may be of any package: loading leaves it out. Leaves the global random state as it is.
    """
    check_stored({"stage_config": dict(stage_config)}, file)
    config = {key: value for key, value in stage_config.items() if key != "optimizer"}
    _check_targets(config, (OWN_PACKAGE, *package_names(trusted)), file)
    try:
        with torch.random.fork_rng(devices=[]):
            build_empty(config, file, trusted)
    except UserError as error:
        raise UserError(
            f"{error}; loading first builds stages on the meta device, so a constructor that reads numbers of a tensor "
            "must make it with device='cpu'"
        ) from None


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any] | None, file: Path) -> dict[str, Any]:
    """A stored config with some values replaced; nulls in `changes` change nothing.

    `changes` has the shape of the config; what it says of the corruption holds for the sampler too, unless it says
    something else of the sampler's. Raises UserError if it names something that is not there, or gives it
    another kind of value.
    """
    check_changes(config, changes or {}, f"changes to the stage of {file}: ")
    stored, given = OmegaConf.create(dict(config)), _without_nulls(changes or {})
    OmegaConf.set_struct(stored, True)
    copied = {}
    if "corruption" in given and "corruption" in (config.get("sampler") or {}):
        copied = {"sampler": {"corruption": given["corruption"]}}  # it has a copy, with settings for sampling alone
    try:
        merged = OmegaConf.merge(stored, copied, given)
    except OmegaConfBaseException as error:
        raise UserError(f"changes to the stage of {file}: {str(error).splitlines()[0]}") from None
    return cast(dict[str, Any], OmegaConf.to_container(merged))


def build_stored(config: Mapping[str, Any], file: Path, trusted: Sequence[str] = (), **arguments: Any) -> Any:
    """Build the object of a stored config, with `arguments` that no config can hold.

    trusted: packages besides this one whose classes it may name. Raises UserError for a class of another package, and
    for one that refuses its settings.
    """
    _check_targets(config, (OWN_PACKAGE, *package_names(trusted)), file)
    try:
        factory = instantiate(OmegaConf.create(dict(config)), _convert_="all", _partial_=True)
        return factory(**arguments) if callable(factory) else factory  # the caller refuses anything but a stage
    except Exception as error:  # foreign settings, and foreign ways to call a class
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"the stage of {file} cannot be built: {reason}") from None


def build_empty(config: Mapping[str, Any], file: Path, trusted: Sequence[str] = ()) -> Any:
    """As build_stored, without memory for weights: what a file describes may be of any size."""
    with torch.device("meta"):
        return build_stored(config, file, trusted)


def _without_nulls(changes: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in changes.items():
        if isinstance(value, Mapping):
            kept[key] = _without_nulls(value)
        elif value is not None:
            kept[key] = value
    return kept
