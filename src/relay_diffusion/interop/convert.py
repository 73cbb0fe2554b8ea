"""Make an exported stage of a published checkpoint, or of one of this project: see USAGE."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relay_diffusion.checkpoint import EXPORT_STAGE, EXPORT_WEIGHTS, build_stored
from relay_diffusion.cli import explain
from relay_diffusion.config import CONF, register_resolvers
from relay_diffusion.data.arguments import refuse_existing, run_tool
from relay_diffusion.errors import UserError
from relay_diffusion.files import file_sha256
from relay_diffusion.interop.export import export_stage
from relay_diffusion.interop.official import OfficialCheckpoint, from_official, read_official
from relay_diffusion.loading import load_stage
from relay_diffusion.stage import DiffusionStage

USAGE = """\
python -m relay_diffusion.interop.convert source=FILE destination=FOLDER [key=value ...]

  source       a published checkpoint: EDM's .pkl or the authors' .pt (nothing in it is run); or one of this project:
               a .ckpt file, the directory of a training run, an exported folder
  destination  the folder to write: weights.safetensors (the averaged weights) and stage.json
  experiment   published files hold the network alone: take corruption, loss and sampler from conf/experiment/NAME.yaml;
               without it, those of a first stage (conf/stage/base.yaml)
  dtype        of the stored weights: float32 (default) | float16 | bfloat16
  overwrite    false: refuse a folder that holds an export (default) | true: replace that
  trusted      packages besides relay_diffusion whose classes the source or the experiment may name: my_package,other
"""
PUBLISHED = (".pkl", ".pt")
_SAME = ("resolution", "image_channels", "channels", "channel_mult", "blocks", "num_classes")


class Dtype(Enum):
    """What weights are stored in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass
class ConvertOptions:
    """The command line of this tool; see USAGE."""

    source: str = MISSING
    destination: str = MISSING
    experiment: str | None = None
    dtype: Dtype = Dtype.float32
    overwrite: bool = False
    trusted: str = ""


def convert(options: ConvertOptions) -> DiffusionStage:
    """Write the folder that `options` describe; returns the stage. Errors: UserError; no stage.json is written then."""
    source = Path(options.source).expanduser()
    destination = Path(options.destination).expanduser()
    if destination.exists() and source.exists() and destination.samefile(source):
        raise UserError(f"destination={options.destination}: is the source itself; choose another name")
    for file in (EXPORT_STAGE, EXPORT_WEIGHTS):
        refuse_existing(destination / file, "destination", options.overwrite)
    trusted = [name.strip() for name in options.trusted.strip("[]").split(",") if name.strip()]
    if source.suffix in PUBLISHED:
        stage = published_stage(source, options.experiment, trusted)
        origin = {"file": source.name, "sha256": file_sha256(source)}
    elif options.experiment is not None:
        raise UserError(f"experiment={options.experiment}: {source} says itself what stage it holds; leave it out")
    else:
        stage = load_stage(source, trusted=trusted)
        origin = {"file": Path(stage.origin["file"]).name, "sha256": stage.origin["sha256"]}
    assert stage.stage_config is not None
    export_stage(
        stage.stage_config,
        stage.denoiser.state_dict(),
        destination,
        class_names=stage.class_names,
        images_seen=stage.images_seen,
        origin=origin,
        dtype=options.dtype.value,
    )
    return stage


def published_stage(path: Path, experiment: str | None = None, trusted: Sequence[str] = ()) -> DiffusionStage:
    """A stage around the network of a published checkpoint; the rest of it is that of `experiment`.

    Without one it is a first stage, with the noise levels that the file was trained at, if it says so. The share of
    labels hidden in training is that of the file, if it says more than 0. `trusted`: as for load_stage. Raises
    UserError naming the file, or what disagrees.
    """
    official = read_official(path)
    config = _compose(experiment)
    network = config["denoiser"]["network"]
    if experiment is None:
        config["corruption"]["schedule"] |= _trained_noise(official)
    elif different := [key for key in _SAME if network.get(key) != official.settings[key]]:
        says = ", ".join(f"{key}={network.get(key)} (the file: {official.settings[key]})" for key in different)
        raise UserError(f"experiment={experiment} is for another network than {path} holds: {says}")
    channels_last = network.get("channels_last", False)  # a matter of speed alone
    config["denoiser"]["network"] = {
        "_target_": "relay_diffusion.networks.UNet",
        **official.settings,
        "channels_last": channels_last,
    }
    for part in ("denoiser", "loss"):
        config[part]["sigma_data"] = official.sigma_data
    config["label_dropout"] = official.label_dropout or config["label_dropout"]
    source = CONF / "train.yaml" if experiment is None else CONF / f"experiment/{experiment}.yaml"
    stage = build_stored(config, source, trusted)
    if not isinstance(stage, DiffusionStage):
        raise UserError(f"experiment={experiment} describes a {type(stage).__name__}, not a DiffusionStage")
    stage.denoiser.network.load_state_dict(from_official(official.weights, stage.denoiser.network))
    stage.stage_config = config
    return stage.eval()


def _compose(experiment: str | None) -> dict[str, Any]:
    """The stage of an experiment as train.py would build it, without its optimizer."""
    main = CONF / "train.yaml"
    register_resolvers()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(main.stem, overrides=[] if experiment is None else [f"experiment={experiment}"])
        config = cast(dict[str, Any], OmegaConf.to_container(cfg.stage, resolve=True, throw_on_missing=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, main)) from None
    config.pop("optimizer", None)
    return config


def _trained_noise(official: OfficialCheckpoint) -> dict[str, float]:
    """p_mean and p_std of the loss that a published file was trained with; nothing, if it does not say."""
    if official.loss is None:
        return {}
    if official.loss.class_name != "EDMLoss":
        name = ascii(official.loss.class_name)[1:-1][:60]
        raise UserError(f"{official.path} was trained with {name}: give experiment=NAME, the stage that it belongs to")
    mean, std = official.loss.state.get("P_mean"), official.loss.state.get("P_std")
    if not (isinstance(mean, int | float) and isinstance(std, int | float) and abs(mean) < 1e3 and 0 < std < 1e3):
        raise UserError(f"{official.path} holds an EDMLoss without P_mean and P_std: give experiment=NAME")
    return {"p_mean": float(mean), "p_std": float(std)}


def _convert_and_report(options: ConvertOptions) -> None:
    stage = convert(options)
    network, block = stage.denoiser.network, stage.corruption.block
    parameters = sum(parameter.numel() for parameter in network.parameters())
    starts = "starts from noise" if block == 1 else f"enlarges {block} times"
    print(
        f"{options.destination}: {parameters:,} parameters, {stage.resolution}x{stage.resolution}, {starts}, "
        f"{stage.num_classes or 'no'} classes, {network.augment_labels or 'no'} augmentation labels, "
        f"{options.dtype.value}"
    )


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], USAGE, ConvertOptions, _convert_and_report))
