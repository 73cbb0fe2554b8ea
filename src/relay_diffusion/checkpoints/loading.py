"""A trained stage from a checkpoint, a run or an export."""

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
from relay_diffusion.models.info import StageInfo
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.utils.files import file_sha256


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
    seen = int(checkpoint.get("images_seen", 0))
    origin = {"file": str(file), "sha256": file_sha256(file), "weights": weights, "images_seen": seen}
    arguments: dict[str, Any] = {}
    if guide is not None:
        weaker = load_stage(guide, weights, trusted=trusted)
        arguments["guide"], origin["guide"] = weaker, weaker.info.origin
    info = StageInfo(config, list(checkpoint.get("class_names", [])), origin, seen)
    stage = cast(DiffusionStage, build_stored(config, file, trusted, info=info, **arguments))
    stage.denoiser.load_state_dict(state)
    try:
        stage.guided()
    except UserError as error:  # guidance that cannot work shows before sampling
        raise UserError(f"{file}: {error}") from None
    return stage.eval()
