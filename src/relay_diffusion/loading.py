"""A trained stage from a checkpoint, a run or an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from relay_diffusion.checkpoint import (
    build_empty,
    build_stored,
    changed_config,
    find_stage,
    read_stage,
    stored_weights,
)
from relay_diffusion.errors import UserError
from relay_diffusion.files import file_sha256
from relay_diffusion.stage import DiffusionStage


def load_stage(
    path: str | Path,
    weights: str = "ema",
    changes: Mapping[str, Any] | None = None,
    guide: str | Path | None = None,
) -> DiffusionStage:
    """A stage in eval mode from what was stored of it alone.

    `path`: a .ckpt file, the directory of a training run, or the folder of an export. `weights`: "ema" or
    "raw". `changes`: values of the stored stage config to replace, e.g. {"sampler": {"steps": 50}}; nulls
    change nothing. `guide`: the same for a weaker network of the same images, to guide away from. Nothing
    stored in the files is executed.
    Raises UserError naming the file, if it cannot be used.
    """
    file = find_stage(path)
    checkpoint = read_stage(file)
    stored = {key: value for key, value in checkpoint["stage_config"].items() if key != "optimizer"}
    config = changed_config({"cuda_graphs": True} | stored, changes, file)  # which older files do not have
    empty = build_empty(config, file)
    if not isinstance(empty, DiffusionStage):
        raise UserError(f"{file} describes a {type(empty).__name__}, not a DiffusionStage")
    state = stored_weights(checkpoint, weights, empty.denoiser, file)
    stage = cast(DiffusionStage, build_stored(config, file))
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
        stage.set_guide(load_stage(guide, weights))
    stage.guided()  # guidance that cannot work shows here
    return stage.eval()
