"""Compare generated images with their nearest training images, to detect copies."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import MISSING
from PIL.Image import Image

from relay_diffusion.analysis.neighbours import (
    QUANTILE,
    Comparison,
    compare,
    nearest_table,
    neighbours_csv,
    picture,
    read,
)
from relay_diffusion.analysis.tables import print_table
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.config.run_dir import wandb_offline
from relay_diffusion.data.image_sets import ImageSet, evenly_spaced, open_image_set
from relay_diffusion.errors import UserError
from relay_diffusion.metrics.inception import Inception
from relay_diffusion.utils.files import refuse_existing, write_text
from relay_diffusion.utils.pictures import save_png
from relay_diffusion.utils.run_lock import is_locked

if TYPE_CHECKING:
    from relay_diffusion.training.loggers.wandb import WandbRun

USAGE = """\
python -m relay_diffusion.cli.neighbours images=FOLDER|ZIP|NPZ reference=FOLDER|ZIP|NPZ [key=value ...]

  images       generated images: folder, image zip or .npz of ADM's samples
  reference    training images; larger ones are averaged in blocks to the size of the generated ones
  subset       a folder inside the reference, such as train (default: everything)
  count        images to compare, evenly spaced over the set (32)
  nearest      number of nearest images shown for each image (3)
  mirrored     true: also compare mirrored reference images, as training mirrors images (default)
  destination  folder for neighbours.png and neighbours.csv (outputs/neighbours)
  weights      Inception weights, a pt_inception-2015-12-05-*.pth (default: those installed)
  overwrite    false: refuse a destination that holds these files (default) | true: replace them
  wandb        directory of train.py or sample.py with logger=wandb: log picture and nearest images to its W&B run too

neighbours.png has a row for each image: the image, its nearest by features, its nearest by pixels; mirrored if that is
nearer. neighbours.csv has the distances: Euclidean of the pool features, root mean square of pixel values 0..255.
"""


FILES = ("neighbours.png", "neighbours.csv")


@dataclass
class NeighboursOptions:
    """Options of this command; see USAGE."""

    images: str = MISSING
    reference: str = MISSING
    subset: str = ""
    count: int = 32
    nearest: int = 3
    mirrored: bool = True
    destination: str = "outputs/neighbours"
    weights: str | None = None
    overwrite: bool = False
    wandb: str | None = None


def opened(options: NeighboursOptions) -> tuple[ImageSet, ImageSet]:
    """Open the images and the reference at one resolution.

    Raises UserError naming the option.
    """
    for option in ("count", "nearest"):
        if (value := getattr(options, option)) < 1:
            raise UserError(f"{option}={value}: must be at least 1")
    images = open_image_set(options.images, "images")
    reference = open_image_set(options.reference, "reference", images.resolution, options.subset)
    if options.nearest >= len(reference):  # each reference image needs this many other ones
        raise UserError(
            f"nearest={options.nearest}: must be less than the number of reference images, which is {len(reference)}"
        )
    return images, reference


def report(comparisons: Mapping[str, Comparison]) -> None:
    """Print distances and the number of suspected copies per space.

    Distances: of images to the reference, and within the reference.
    """
    titles = [
        "distance to the nearest",
        "images to reference: median",
        "  lowest",
        "reference to other reference: median",
        f"  {QUANTILE:.0%} quantile",
        "  lowest",
        "images within the quantile",
    ]
    columns = []
    for space, (found, scale) in comparisons.items():
        distances, limit = found.distances[:, 0], scale.quantile(QUANTILE)
        within = int((distances <= limit).sum())  # "<=": duplicates in the reference may make the quantile 0
        numbers = (distances.quantile(0.5), distances.min(), scale.quantile(0.5), limit, scale.min())
        columns.append([space, *(f"{number:.4g}" for number in numbers), f"{within} of {len(distances)}"])
    print_table(list(zip(titles, *columns, strict=True)), 14)


def analyze(options: NeighboursOptions) -> None:
    """Write neighbours.png and neighbours.csv; print the table.

    Raises UserError naming the option.
    """
    destination = Path(options.destination).expanduser()
    for file in FILES:
        refuse_existing(destination / file, "destination", options.overwrite)
    directory = Path(options.wandb or "").expanduser()
    run = None if options.wandb is None else _wandb_run(directory, destination)
    images, reference = opened(options)
    inception = Inception(options.weights, "weights")
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"destination={options.destination}: cannot be created ({error.strerror}); choose another folder"
        ) from error
    chosen = evenly_spaced(min(options.count, len(images)), len(images))
    pixels = read(images, chosen, "reading images")
    comparisons = compare(pixels, reference, inception, options.nearest, options.mirrored)
    drawn = picture(pixels, reference, [comparison.found for comparison in comparisons.values()])
    save_png(drawn, destination / FILES[0])
    names = [images.names[index] for index in chosen]
    write_text(destination / FILES[1], neighbours_csv(names, reference.names, comparisons))
    report(comparisons)
    scale = len(comparisons["pixels"].scale)
    print(
        f"{len(chosen):,} of {len(images):,} images, {len(reference):,} reference images ({scale:,} for scale); "
        f"neighbours.png and neighbours.csv in {destination}"
    )
    if run is not None:
        columns, rows = nearest_table(pixels, names, reference, comparisons)
        _log(run, directory, drawn, columns, rows)


def _wandb_run(directory: Path, destination: Path) -> WandbRun:
    """Build the logger of the W&B run of a directory. Raises UserError if there is none, or no account."""
    from relay_diffusion.training.loggers.wandb import FILE, PROJECT, WandbRun, read_record  # takes seconds

    record = read_record(directory)
    if record is None:
        raise UserError(f"wandb={directory}: has no {FILE}; give a run that was trained or sampled with logger=wandb")
    if is_locked(record["directory"]):
        raise UserError(f"wandb={directory}: {record['directory']} is training; repeat the command when it has ended")
    run = WandbRun(record.get("project", PROJECT), record["id"], destination, offline=wandb_offline())
    run.check_login()
    run.join(record)
    return run


def _log(run: WandbRun, directory: Path, drawn: Image, columns: list[str], rows: list[list[Any]]) -> None:
    """Log the picture and the table to a W&B run.

    The x-axis is the images seen at the last row in the log of `directory`.
    """
    from relay_diffusion.training.loggers import MetricsCSV, last_step  # takes seconds

    log = [MetricsCSV(directory / "log")]
    seen = max(last_step(log, "train"), last_step(log, "relay"), 0)
    run.log_image("neighbours/picture", [drawn], step=seen)
    run.log_image_table("neighbours/nearest", columns, rows, step=seen)
    run.finalize("success")


def main() -> NoReturn:
    """Run the command."""
    sys.exit(run_tool(sys.argv[1:], USAGE, NeighboursOptions, analyze))


if __name__ == "__main__":
    main()
