"""What the settings of a sampling run choose."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from relay_diffusion.errors import require
from relay_diffusion.utils.messages import shown


def chosen_stages(relay: DictConfig) -> dict[str, DictConfig]:
    """The stages to run, by name, in order: from `relay.first` to `relay.last`; with `relay.start` from the second.

    Raises UserError for a name that is no stage, and where first, last and start contradict each other.
    """
    names = [str(name) for name in relay.stages]
    require(len(names) > 0, "relay.stages is empty: a relay needs at least a first stage")
    for key in ("first", "last"):
        require(relay[key] is None or relay[key] in names, f"relay.{key}={shown(relay[key])}: the stages are {names}")
    start, first, last = relay.start is not None, relay.first, relay.last
    require(
        start or first in (None, names[0]),
        f"relay.first={first}: relay.start=FOLDER must give the images that it starts from",
    )
    require(not start or len(names) > 1 or first is not None, "relay.start: the relay has no second stage")
    begin = names.index(first) if first is not None else int(start)
    end = names.index(last) if last is not None else len(names) - 1
    require(begin <= end, f"relay.last={last} comes before the first stage to run, {names[begin]}")
    chosen = names[begin : end + 1]
    for name in chosen:
        require(not OmegaConf.is_missing(relay.stages, name), f"relay.stages.{name} has no value: it must be a stage")
    return {name: relay.stages[name] for name in chosen}


def reference_of(cfg: DictConfig) -> dict[str, Any]:
    """path and subset of what mode=evaluate compares with: `reference`, or else the relay's own."""
    if cfg.reference is not None:
        return {"path": cfg.reference, "subset": ""}
    return {
        "path": OmegaConf.select(cfg, "relay.reference.path"),
        "subset": OmegaConf.select(cfg, "relay.reference.subset", default=""),
    }
