"""Export a stage of a published checkpoint or of this project."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, cast

from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relay_diffusion.checkpoints.export import EXPORT_STAGE, EXPORT_WEIGHTS, export_loaded
from relay_diffusion.checkpoints.hub import is_address
from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.checkpoints.published.convert import published_stage
from relay_diffusion.checkpoints.reading import PUBLISHED
from relay_diffusion.cli.arguments import listed, run_tool
from relay_diffusion.cli.errors import explain
from relay_diffusion.config import CONF, compose
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.utils.files import file_sha256, refuse_existing
from relay_diffusion.utils.resolution import size_text

USAGE = """\
python -m relay_diffusion.cli.convert_checkpoint source=FILE destination=FOLDER [key=value ...]

  source       a published checkpoint: EDM's .pkl or the authors' .pt (no code in it runs); or one of this project:
               a .ckpt file, the directory of a training run, an exported folder, hf://USER/NAME/FOLDER
  destination  the folder to write: weights.safetensors (the EMA weights) and stage.json
  experiment   source of corruption, loss and sampler for a published file, conf/experiment/NAME.yaml
               (default: a first stage, conf/stage/base.yaml)
  dtype        data type of the written weights: float32 (default) | float16 | bfloat16
  overwrite    false: refuse a folder that holds an export (default) | true: replace that
  trusted      packages besides relay_diffusion whose classes the source or the experiment may name: my_package,other
"""


class Dtype(Enum):
    """Data type of the stored weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass
class ConvertOptions:
    """Options of this command; see USAGE."""

    source: str = MISSING
    destination: str = MISSING
    experiment: str | None = None
    dtype: Dtype = Dtype.float32
    overwrite: bool = False
    trusted: str = ""


def convert(options: ConvertOptions) -> DiffusionStage:
    """Write the export and return the stage. Raises UserError before writing stage.json."""
    source, on_hub = Path(options.source).expanduser(), is_address(options.source)
    destination = Path(options.destination).expanduser()
    if destination.exists() and source.exists() and destination.samefile(source):
        raise UserError(f"destination={options.destination}: is the source; choose another name")
    for file in (EXPORT_STAGE, EXPORT_WEIGHTS):
        refuse_existing(destination / file, "destination", options.overwrite)
    trusted = listed(options.trusted)
    origin = None
    if source.suffix in PUBLISHED and not on_hub:
        stage = published_stage(source, compose_stage(options.experiment), options.experiment, trusted)
        origin = {"file": source.name, "sha256": file_sha256(source)}
    elif options.experiment is not None:
        raise UserError(f"experiment={options.experiment}: {source} contains its stage config; leave experiment out")
    else:
        stage = load_stage(options.source if on_hub else source, trusted=trusted)
    export_loaded(stage, destination, options.dtype.value, origin)
    return stage


def compose_stage(experiment: str | None) -> dict[str, Any]:
    """Compose the stage config of an experiment, without its optimizer."""
    try:
        cfg = compose("train", [] if experiment is None else [f"experiment={experiment}"], CONF)
        config = cast(dict[str, Any], OmegaConf.to_container(cfg.stage, resolve=True, throw_on_missing=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, CONF / "train.yaml")) from None
    config.pop("optimizer", None)
    return config


def _convert_and_report(options: ConvertOptions) -> None:
    stage = convert(options)
    network, block = stage.denoiser.network, stage.corruption.block
    parameters = sum(parameter.numel() for parameter in network.parameters())
    starts = "starts from noise" if block == 1 else f"enlarges {block} times"
    print(
        f"{options.destination}: {parameters:,} parameters, {size_text(stage.size)}, {starts}, "
        f"{stage.num_classes or 'no'} classes, {network.augment_labels or 'no'} augmentation labels, "
        f"{options.dtype.value}"
    )


def main() -> NoReturn:
    """Run the command."""
    sys.exit(run_tool(sys.argv[1:], USAGE, ConvertOptions, _convert_and_report))


if __name__ == "__main__":
    main()
