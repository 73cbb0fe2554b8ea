"""Settings of a sampling run, read from its configuration once. Imports neither torch nor lightning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from relay_diffusion.errors import require
from relay_diffusion.utils.messages import shorten


def chosen_stages(relay: DictConfig) -> dict[str, DictConfig]:
    """The stages to run, by name, in order: from `relay.first` to `relay.last`; with `relay.start` from the second.

    Raises UserError for a name that is no stage, and where first, last and start contradict each other.
    """
    names = [str(name) for name in relay.stages]
    require(len(names) > 0, "relay.stages is empty: a relay needs at least a first stage")
    for key in ("first", "last"):
        require(relay[key] is None or relay[key] in names, f"relay.{key}={shorten(relay[key])}: the stages are {names}")
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
    """Return path and subset of the reference: `reference`, or else the relay's."""
    if cfg.reference is not None:
        return {"path": cfg.reference, "subset": ""}
    return {
        "path": OmegaConf.select(cfg, "relay.reference.path"),
        "subset": OmegaConf.select(cfg, "relay.reference.subset", default=""),
    }


@dataclass(frozen=True)
class StartOptions:
    """Images to start from: `path` None means noise. exif: "apply" or "ignore"."""

    path: str | None
    subset: str
    exif: str


@dataclass(frozen=True)
class ReferenceOptions:
    """Reference of an evaluation; option: the key that the user set, for messages."""

    path: str | None
    subset: str
    option: str


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of a sampling run besides the objects that Hydra builds: relay, trainer and metrics.

    seeds: as the user gave them; None: all, which are default_seeds or every image of `start`. classes: names or
    indices as given; None: all in turn. trajectory: how many images are drawn with their intermediate states.
    config: the resolved configuration as YAML.
    """

    output: Path
    run_id: str
    evaluate: bool
    images: str | None
    seeds: Any
    default_seeds: Any
    classes: Any
    start: StartOptions
    reference: ReferenceOptions
    batch_size: int
    format: str
    npz: bool
    picture: int
    trajectory: int
    precision: str
    config: str

    @property
    def shown_seeds(self) -> str | None:
        """The seeds for metrics.json: "all" for every image that is enlarged, None for images that exist."""
        if self.images is not None:
            return None
        every = self.default_seeds if self.start.path is None else "all"
        return str(every if self.seeds is None else self.seeds)


def sampling_options(cfg: DictConfig) -> SamplingOptions:
    """Convert the configuration of sample.py."""
    chosen = cfg["class"]
    reference = reference_of(cfg)
    return SamplingOptions(
        output=Path(cfg.output),
        run_id=str(cfg.run_id),
        evaluate=cfg.mode == "evaluate",
        images=cfg.images,
        seeds=cfg.seeds,
        default_seeds=cfg.relay.seeds,
        classes=OmegaConf.to_object(chosen) if isinstance(chosen, ListConfig) else chosen,
        start=StartOptions(cfg.relay.start, cfg.relay.start_subset, cfg.relay.start_exif),
        reference=ReferenceOptions(
            reference["path"], reference["subset"], "relay.reference.path" if cfg.reference is None else "reference"
        ),
        batch_size=cfg.batch_size,
        format=cfg.format,
        npz=cfg.npz,
        picture=cfg.picture,
        trajectory=4 if cfg.save_trajectory is True else int(cfg.save_trajectory),
        precision=cfg.trainer.precision,
        config=OmegaConf.to_yaml(cfg, resolve=True),
    )
