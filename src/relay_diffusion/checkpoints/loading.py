"""Stages and relays from checkpoints, training runs and exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from relay_diffusion.checkpoints.reading import (
    build_empty,
    build_stored,
    changed_config,
    find_stage,
    read_stage,
    stored_weights,
)
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.utils.files import file_sha256, parse_json
from relay_diffusion.utils.messages import short

RELAY_FILE = "relay.json"  # in the folder of a relay
RELAY_FORMAT = 1


def load_stage(
    path: str | Path,
    weights: str = "ema",
    changes: Mapping[str, Any] | None = None,
    guide: str | Path | None = None,
    trusted: Sequence[str] = (),
) -> DiffusionStage:
    """A stage in eval mode from what was stored of it alone.

    `path`: a .ckpt file, the directory of a training run, or the folder of an export. `weights`: "ema" or
    "raw". `changes`: values of the stored stage config to replace, e.g. {"sampler": {"steps": 50}}; nulls
    change nothing; guidance_scale 1 disables guidance, guidance_interval [0, inf] lifts a stored interval.
    `guide`: the same as `path` for a weaker network of the same images, to guide away from.
    `trusted`: packages besides relay_diffusion whose classes the files may name, such as ["my_package"]; these are
    imported and called, nothing else that the files name is.
    Raises UserError naming the file, if it cannot be used.
    """
    file = find_stage(path)
    checkpoint = read_stage(file)
    stored = {key: value for key, value in checkpoint["stage_config"].items() if key != "optimizer"}
    config = changed_config(
        {"cuda_graphs": True, "label_dropout": 0.0} | stored, changes, file
    )  # older files lack them
    if config.get("guidance_scale", 1) == 1 and (changes or {}).get("guidance_interval") is not None:
        raise UserError(
            f"changes to the stage of {file}: guidance_interval needs a guidance_scale other than 1, e.g. 2"
        )
    empty = build_empty(config, file, trusted)
    if not isinstance(empty, DiffusionStage):
        raise UserError(f"{file} describes a {type(empty).__name__}, not a DiffusionStage")
    state = stored_weights(checkpoint, weights, empty.denoiser, file)
    stage = cast(DiffusionStage, build_stored(config, file, trusted))
    stage.denoiser.load_state_dict(state)
    stage.stage_config = config
    stage.class_names = list(checkpoint.get("class_names", []))
    stage.images_seen = int(checkpoint.get("images_seen", 0))
    stage.origin = {
        "file": str(file),
        "sha256": file_sha256(file),
        "weights": weights,
        "images_seen": stage.images_seen,
    }
    if guide is not None:
        stage.set_guide(load_stage(guide, weights, trusted=trusted))
    try:
        stage.guided()
    except UserError as error:  # guidance that cannot work shows before sampling
        raise UserError(f"{file}: {error}") from None
    return stage.eval()


def load_relay(
    source: str | Path | Mapping[str, str | Path],
    weights: str = "ema",
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    trusted: Sequence[str] = (),
) -> Relay:
    """Load a relay from a folder with relay.json, or from the paths of its stages.

    `source`: a folder that holds relay.json, e.g. {"format": 1, "stages": {"base": {"path": "base"}, "relay": {"path":
    "relay"}}}, with paths relative to it and stages in order; or a mapping of stage names to paths, as load_stage takes
    them. `changes`: those of each stage by its name, e.g. {"base": {"sampler": {"steps": 50}}}. `weights`, `trusted`:
    as for load_stage.
    Raises UserError naming the file or the stage, if it cannot be used.
    """
    if isinstance(source, Mapping):
        said, paths = "", {name: Path(path) for name, path in source.items()}
    else:
        file = _relay_file(Path(source))
        said, paths = f"{file}: ", _stage_paths(file)
    for name in changes or {}:
        if name not in paths:
            raise UserError(f"changes.{name}: {said}the relay has no stage {name}; its stages are {', '.join(paths)}")
    stages = {}
    for name, path in paths.items():
        try:
            stages[name] = load_stage(path, weights, (changes or {}).get(name), trusted=trusted)
        except UserError as error:
            raise UserError(f"{said}stages.{name}: {error}") from None
    return Relay(stages)


def _relay_file(path: Path) -> Path:
    file = path if path.name == RELAY_FILE else path / RELAY_FILE
    if not file.is_file():
        raise UserError(
            f"no relay at {path}: give a folder with {RELAY_FILE}, or the path of each stage, e.g. "
            "load_relay({'base': PATH, 'relay': PATH}); load_stage loads a single stage"
        )
    return file


def _stage_paths(file: Path) -> dict[str, Path]:
    """The path of each stage in a relay.json."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if content["format"] != RELAY_FORMAT:
            raise UserError(
                f"{file} is a relay in format {short(content['format'])}: this version reads {RELAY_FORMAT}"
            )
        if content.keys() != {"format", "stages"} or any(
            stage.keys() != {"path"} for stage in content["stages"].values()
        ):
            raise ValueError
        return {name: file.parent / stage["path"] for name, stage in content["stages"].items()}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f'{file} cannot be read: must be {{"format": {RELAY_FORMAT}, "stages": {{NAME: {{"path": PATH}}, ...}}}}'
        ) from None
