"""Settings of a sampling run. Imports neither torch nor lightning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from relay_diffusion.errors import require
from relay_diffusion.utils.messages import shorten


def chosen_stages(relay: DictConfig) -> dict[str, DictConfig]:
    """Select the stages from `relay.first` to `relay.last`, by name.

    The default of `relay.first` is the second stage, if there is one and `relay.start` is set. Raises UserError for an
    unknown stage, and if first, last and start contradict each other.
    """
    names = [str(name) for name in relay.stages]
    require(len(names) > 0, "relay.stages is empty: a relay needs at least a first stage")
    for key in ("first", "last"):
        require(
            relay[key] is None or relay[key] in names,
            f"relay.{key}={shorten(relay[key])}: use one of {', '.join(names)}",
        )
    start, first, last = relay.start is not None, relay.first, relay.last
    require(
        start or first in (None, names[0]),
        f"relay.start is missing: the stage relay.first={first} starts from images; add relay.start=FILE or FOLDER",
    )
    begin = names.index(first) if first is not None else int(start and len(names) > 1)
    end = names.index(last) if last is not None else len(names) - 1
    require(begin <= end, f"relay.last={last} is before the first stage to run, {names[begin]}; choose a later one")
    chosen = names[begin : end + 1]
    for name in chosen:
        require(not OmegaConf.is_missing(relay.stages, name), f"relay.stages.{name} has no value: it must be a stage")
    return {name: relay.stages[name] for name in chosen}


def reference_of(cfg: DictConfig) -> dict[str, Any]:
    """Return path and subset of `reference` or else `relay.reference`."""
    if cfg.reference is not None:
        return {"path": cfg.reference, "subset": ""}
    return {
        "path": OmegaConf.select(cfg, "relay.reference.path"),
        "subset": OmegaConf.select(cfg, "relay.reference.subset", default=""),
    }


@dataclass(frozen=True)
class StartOptions:
    """Starting images; `path` None: noise. exif: "apply" or "ignore".

    size: "own" (each image keeps its size), "input" (all are averaged to the input resolution of the relay), or None:
    "input" for an evaluation, for a relay of another resolution, and for images that all have the input resolution.
    """

    path: str | None = None
    subset: str = ""
    exif: str = "apply"
    size: str | None = None


@dataclass(frozen=True)
class ReferenceOptions:
    """Reference of an evaluation. option: the key in messages."""

    path: str | None = None
    subset: str = ""
    option: str = "reference"


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of a sampling run, without relay, trainer and metrics.

    seeds: as given; None: default_seeds, or every image of `start`. classes: names or indices as given; None: all in
    turn. trajectory: number of images that are drawn with their intermediate states. config: the resolved configuration
    as YAML. prompt: a text or a list of texts, in turn; "reference": captions of the reference. prompts: file with a
    prompt in each line. The plan and the evaluator are made of `seeds`, `classes`, `prompt`, `prompts`,
    `negative_prompt`, `start`, `images`, `evaluate` and `reference`; sample_relay takes both as arguments and only
    records these. Raises ValueError for another format or compression.
    """

    output: Path
    run_id: str = ""
    evaluate: bool = False
    images: str | None = None
    seeds: Any = None
    default_seeds: Any = None
    classes: Any = None
    prompt: str | list[str] | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    start: StartOptions = field(default_factory=StartOptions)
    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    batch_size: int = 32
    format: str = "png"
    png_compression: int = 4
    npz: bool = False
    picture: int = 16
    trajectory: int = 0
    config: str = ""

    @property
    def shown_seeds(self) -> str | None:
        """Seeds for metrics.json.

        "all" for every image of `start`; None for existing images.
        """
        if self.images is not None:
            return None
        every = self.default_seeds if self.start.path is None else "all"
        shown = every if self.seeds is None else self.seeds
        return None if shown is None else str(shown)

    def __post_init__(self) -> None:
        if self.format not in ("png", "zip"):
            raise ValueError(f"format={self.format}: use png or zip")
        if not 0 <= self.png_compression <= 9:
            raise ValueError(f"png_compression={self.png_compression}: must lie between 0 and 9")


def sampling_options(cfg: DictConfig) -> SamplingOptions:
    """Convert the configuration of sample.py."""
    chosen = cfg["class"]
    prompt = cfg.prompt
    reference = reference_of(cfg)
    start_size = OmegaConf.select(cfg, "relay.start_size")  # older choices lack it, as the resolution
    if start_size is None and OmegaConf.select(cfg, "relay.resolution") is not None:
        start_size = "input"
    return SamplingOptions(
        output=Path(cfg.output),
        run_id=str(cfg.run_id),
        evaluate=cfg.mode == "evaluate",
        images=cfg.images,
        seeds=cfg.seeds,
        default_seeds=cfg.relay.seeds,
        classes=OmegaConf.to_object(chosen) if isinstance(chosen, ListConfig) else chosen,
        prompt=list(prompt) if isinstance(prompt, ListConfig) else prompt,
        prompts=None if cfg.prompts is None else str(cfg.prompts),
        negative_prompt=cfg.negative_prompt,
        start=StartOptions(cfg.relay.start, cfg.relay.start_subset, cfg.relay.start_exif, start_size),
        reference=ReferenceOptions(
            reference["path"], reference["subset"], "relay.reference.path" if cfg.reference is None else "reference"
        ),
        batch_size=cfg.batch_size,
        format=cfg.format,
        png_compression=cfg.png_compression,
        npz=cfg.npz,
        picture=cfg.picture,
        trajectory=4 if cfg.save_trajectory is True else int(cfg.save_trajectory),
        config=OmegaConf.to_yaml(cfg, resolve=True),
    )
