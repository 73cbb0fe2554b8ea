"""Publish a relay: to a folder or to a repository on the Hugging Face Hub."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NoReturn

from omegaconf import MISSING
from PIL import Image

from relay_diffusion.checkpoints.diffusers_layout import INDEX_FILE, PIPELINE_FILE, write_diffusers_files
from relay_diffusion.checkpoints.export import EXPORT_STAGE, EXPORT_WEIGHTS, RELAY_FILE, export_relay
from relay_diffusion.checkpoints.hub import (
    SCHEME,
    HubAddress,
    check_installed,
    files_to_replace,
    is_address,
    parse_address,
    upload,
)
from relay_diffusion.checkpoints.loading import build_chain, find_relay, load_relay, load_stage
from relay_diffusion.cli.arguments import listed, run_tool
from relay_diffusion.cli.convert_checkpoint import Dtype
from relay_diffusion.cli.model_card import check_measured, model_card, read_metrics
from relay_diffusion.data.decode import decode_rgb
from relay_diffusion.errors import UserError, prefix_errors, require
from relay_diffusion.models.relay import Relay
from relay_diffusion.utils.files import atomic_folder, refuse_existing, write_text
from relay_diffusion.utils.messages import shorten
from relay_diffusion.utils.pictures import save_png

USAGE = """\
python -m relay_diffusion.cli.publish source=SOURCE destination=FOLDER|hf://USER/NAME [key=value ...]

  source       a relay: a folder with relay.json, hf://USER/NAME, or its stages in order as base=PATH,relay=PATH; or one
               stage: a training run, a .ckpt file, an exported folder
  destination  a folder, or hf://USER/NAME[@BRANCH], which is created if it is missing (log in first: hf auth login)
  format       relay (default) | diffusers: also a custom pipeline of the library diffusers
  dtype        data type of the written weights: float32 (default) | float16 | bfloat16
  license      license of the weights, e.g. apache-2.0 (unknown)
  datasets     data sets of training on the Hub: USER/DATA,other
  tags         more tags of the model card: emoji,256x256
  metrics      a metrics.json of sample.py mode=evaluate, for the model card
  image        a picture for the model card: PNG, JPEG or WebP
  private      true: a new repository is private | false: as the account's default (default)
  overwrite    false: refuse a destination that has a relay.json or README.md (default) | true: replace that relay
  trusted      packages besides relay_diffusion whose classes the source may name: my_package,other

The destination gets relay.json, a folder for each stage (weights.safetensors: the EMA weights; stage.json),
README.md (the model card) and samples.png; with format=diffusers also model_index.json and pipeline.py. Writing a
folder needs no network. huggingface_hub must be installed: pip install -e '.[hub]'
"""
CARD, PICTURE = "README.md", "samples.png"
EXPORT = (EXPORT_STAGE, EXPORT_WEIGHTS)
DIFFUSERS = (INDEX_FILE, PIPELINE_FILE)


class Format(Enum):
    """Who reads the published files."""

    relay = "relay"
    diffusers = "diffusers"


@dataclass
class PublishOptions:
    """Options of this command; see USAGE."""

    source: str = MISSING
    destination: str = MISSING
    format: Format = Format.relay
    dtype: Dtype = Dtype.float32
    license: str = "unknown"
    datasets: str = ""
    tags: str = ""
    metrics: str | None = None
    image: str | None = None
    private: bool = False
    overwrite: bool = False
    trusted: str = ""


def publish(options: PublishOptions) -> tuple[Relay, str]:
    """Publish a relay; return it and its path or URL.

    Raises UserError before anything is written, and for an upload that fails.
    """
    check_installed(f"destination={options.destination}")
    metrics = None if options.metrics is None else read_metrics(options.metrics)
    picture = None if options.image is None else _picture(options.image)
    with prefix_errors("destination"):
        target = parse_address(options.destination) if is_address(options.destination) else None
    folder = Path(options.destination).expanduser().resolve()
    if target is None:
        _check_folder(folder, options)
    replaced = [] if target is None else _files_to_replace(target, options)
    relay = _load(options)
    if metrics is not None:
        check_measured(metrics, relay, f"metrics={options.metrics}")
    card = model_card(
        relay,
        folder.name if target is None else str(target).removeprefix(SCHEME),
        dtype=options.dtype.value,
        license=options.license,
        datasets=listed(options.datasets),
        tags=listed(options.tags),
        metrics=metrics,
        picture=None if picture is None else PICTURE,
        diffusers=options.format is Format.diffusers,
    )

    def write(root: Path) -> None:
        export_relay(relay.chain(), root, options.dtype.value, relay.consistency)
        if options.format is Format.diffusers:
            write_diffusers_files(root)
        write_text(root / CARD, card)
        if picture is not None:
            save_png(picture, root / PICTURE)

    if target is None:
        with atomic_folder(folder) as root:
            write(root)
        return relay, options.destination
    with tempfile.TemporaryDirectory() as temporary:
        write(root := Path(temporary))
        stale = [name for name in replaced if Path(name).name in EXPORT and not (root / name).exists()]
        return relay, upload(root, target, options.private, stale)


def _check_folder(folder: Path, options: PublishOptions) -> None:
    """Require a folder that publishing may replace.

    It is new or empty, or with overwrite=true holds a published relay and nothing else.
    """
    option = f"destination={options.destination}"
    require(not options.private, f"private=true: {option} is a folder; remove private")
    require(not folder.exists() or folder.is_dir(), f"{option}: is a file; give the name of a folder")
    for name in (RELAY_FILE, CARD):
        refuse_existing(folder / name, "destination", options.overwrite)
    earlier = find_relay(folder)
    known = {folder / name for name in (RELAY_FILE, CARD, PICTURE, *(DIFFUSERS if earlier else ()))}
    known |= {folder / name / file for name in (earlier.stages if earlier else ()) for file in EXPORT}
    other = next((path for path in folder.rglob("*") if not path.is_dir() and path not in known), None)
    require(other is None, f"{option}: also holds {shorten(other)}; choose another folder")


def _files_to_replace(target: HubAddress, options: PublishOptions) -> list[str]:
    """Return the files of the repository; empty if it is new.

    Raises UserError for a relay or a model card in it without overwrite=true.
    """
    option = f"destination={options.destination}"
    require(target.folder == "", f"{option}: a relay is published to the root of a repository; remove the folder")
    with prefix_errors("destination"):
        files = files_to_replace(target, options.private)
    for name in (RELAY_FILE, CARD, *(DIFFUSERS if options.format is Format.diffusers else ())):
        require(
            options.overwrite or name not in files,
            f"{option}: has a {name} already; choose another name, or overwrite=true to replace it",
        )
    return files


def _load(options: PublishOptions) -> Relay:
    """Load `source`: a relay, its stages, or one stage."""
    source, trusted = options.source, listed(options.trusted)
    parts = [part.partition("=") for part in source.split(",")]
    if all(path for _, _, path in parts) and not Path(source).exists():
        stages = {name: _local(path) for name, _, path in parts}
        require(len(stages) == len(parts), f"source={source}: has two stages of one name; rename one")
        return load_relay(stages, trusted=trusted)
    if find_relay(_local(source)) is not None:
        return load_relay(_local(source), trusted=trusted)
    stage = load_stage(_local(source), trusted=trusted)
    return build_chain({"base" if stage.corruption.block == 1 else "relay": stage}, {}, trusted)


def _local(path: str) -> str | Path:
    return path if is_address(path) else Path(path).expanduser()


def _picture(path: str) -> Image.Image:
    """Decode a picture, without its metadata."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"image={path}: cannot be read ({error.strerror}); give a PNG, JPEG or WebP file") from None
    return decode_rgb(data, f"image={path}")


def _publish_and_report(options: PublishOptions) -> None:
    relay, place = publish(options)
    parameters = sum(p.numel() for stage in relay.chain().values() for p in stage.denoiser.parameters())
    print(f"{place}: stages {', '.join(relay.chain())}, {parameters:,} parameters, {options.dtype.value}")
    print(f"load: relay_diffusion.load_relay({json.dumps(options.destination)})")
    print(f"web app: python -m relay_diffusion.cli.app {shlex.quote(f'relay={options.destination}')}")


def main() -> NoReturn:
    """Run the command."""
    sys.exit(run_tool(sys.argv[1:], USAGE, PublishOptions, _publish_and_report))


if __name__ == "__main__":
    main()
