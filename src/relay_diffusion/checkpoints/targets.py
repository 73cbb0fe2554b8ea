"""Class names in stored configs: translation and trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.messages import shorten

OWN_PACKAGE = "relay_diffusion"  # always trusted
RENAMED = {  # old name -> new name, for stored configs of earlier versions
    "relay_diffusion.stage": "relay_diffusion.models",
    "relay_diffusion.cascade": "relay_diffusion.models",
    "relay_diffusion.data.augment": "relay_diffusion.diffusion.augment",
    "relay_diffusion.diffusion.conditioning": "relay_diffusion.diffusion.corruption",
    "relay_diffusion.loading": "relay_diffusion.checkpoints",
    "relay_diffusion.metrics.EvaluationProtocol": "relay_diffusion.metrics.Protocol",
    "relay_diffusion.metrics.FIDMeasure": "relay_diffusion.metrics.FIDMetric",
    "relay_diffusion.metrics.SFIDMeasure": "relay_diffusion.metrics.SFIDMetric",
    "relay_diffusion.metrics.InceptionScoreMeasure": "relay_diffusion.metrics.InceptionScoreMetric",
    "relay_diffusion.metrics.PrecisionRecallMeasure": "relay_diffusion.metrics.PrecisionRecallMetric",
    "relay_diffusion.metrics.KIDMeasure": "relay_diffusion.metrics.KIDMetric",
    "relay_diffusion.postprocess": "relay_diffusion.sampling.postprocess",
    "relay_diffusion.trainer": "relay_diffusion.training.trainer",
    "relay_diffusion.callbacks.Evaluator": "relay_diffusion.metrics.Evaluator",
    "relay_diffusion.callbacks.TrainingProgress": "relay_diffusion.training.callbacks.ImagesProgress",
    "relay_diffusion.callbacks": "relay_diffusion.training.callbacks",
    "relay_diffusion.loggers.wandb_run": "relay_diffusion.training.loggers.wandb",
    "relay_diffusion.loggers": "relay_diffusion.training.loggers",
}


def translate_targets(node: Any) -> Any:
    """Return a stored config with the `_target_` names of this version."""
    if isinstance(node, Mapping):
        return {
            key: _translate(value) if key == "_target_" and isinstance(value, str) else translate_targets(value)
            for key, value in node.items()
        }
    return [translate_targets(value) for value in node] if isinstance(node, list | tuple) else node


def _translate(target: str) -> str:
    moved = max((old for old in RENAMED if inside(target, [old])), key=len, default=None)
    return target if moved is None else RENAMED[moved] + target.removeprefix(moved)


def package_names(trusted: Any) -> tuple[str, ...]:
    """Return the packages whose classes a stored config may instantiate, e.g. my_package.samplers.

    Raises UserError for anything but a list of such names.
    """
    listed = isinstance(trusted, Sequence) and not isinstance(trusted, str)
    require(listed, f"trusted={shorten(trusted)}: must be a list of packages, e.g. [my_package]")
    for name in trusted:
        named = isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
        require(named, f"trusted holds {shorten(name)}: must be names of packages, e.g. my_package.samplers")
    return tuple(trusted)


def check_targets(node: Any, packages: Sequence[str], file: Path | str) -> None:
    """Raise UserError unless a config names only classes of trusted packages.

    file: source of the config, for messages.
    """
    if isinstance(node, str) and "${" in node:
        raise UserError(f"{file} holds a config with an interpolation ({node[:60]}): refused")
    if isinstance(node, Mapping):
        if node.get("_target_") is not None:
            _check_target(node["_target_"], packages, file)
        for value in node.values():
            check_targets(value, packages, file)
    elif isinstance(node, list | tuple):
        for value in node:
            check_targets(value, packages, file)


def _check_target(target: Any, packages: Sequence[str], file: Path | str) -> None:
    if not (isinstance(target, str) and inside(target, packages)):
        package = target.partition(".")[0] if isinstance(target, str) else ""
        remedy = f"refused; if you trust it, add trusted=[{shorten(package)}]" if package.isidentifier() else "refused"
        raise UserError(f"{file} names '{shorten(target)}', which is not a class of {' or '.join(packages)}: {remedy}")
    try:
        found = get_class(target)
    except Exception:
        raise UserError(f"{file} names {shorten(target)}, which is not a class that can be imported here") from None
    if not inside(found.__module__, packages):
        raise UserError(
            f"{file} names {shorten(target)}, which comes from {shorten(found.__module__)}, outside "
            f"{' or '.join(packages)}: refused"
        )


def inside(name: str, packages: Sequence[str]) -> bool:
    """Return whether a dotted name lies in one of the packages.

    my_package does not contain my_package_2.
    """
    return any(name == package or name.startswith(f"{package}.") for package in packages)
