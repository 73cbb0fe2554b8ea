"""Are images copies of the training set? `python -m relay_diffusion.analysis.neighbours images=... reference=...`.

Shows generated images beside their nearest training images, by Inception features and by pixels, and compares these
distances with those among the training images themselves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import MISSING
from PIL import Image
from torch import Tensor

from relay_diffusion.analysis.nearest import NearestSearch, Neighbours
from relay_diffusion.data.arguments import refuse_existing, run_tool
from relay_diffusion.data.image_sets import ImageSet, open_image_set, spread
from relay_diffusion.errors import UserError
from relay_diffusion.files import csv_text, write_text
from relay_diffusion.host import prepare_host
from relay_diffusion.metrics.inception import Inception
from relay_diffusion.pictures import image_grid, save_png, side_by_side
from relay_diffusion.progress import progress

USAGE = """\
python -m relay_diffusion.analysis.neighbours images=FOLDER|ZIP|NPZ reference=FOLDER|ZIP|NPZ [key=value ...]

  images       generated images: folder, image zip or .npz of ADM's samples
  reference    the images that were trained on; larger ones are box-averaged to the size of the others
  subset       a folder inside the reference, such as train (default: everything)
  count        images looked at, spread evenly over the set (32)
  nearest      neighbours of each image (3)
  mirrored     true: reference images are compared mirrored too, as training mirrors images (default)
  destination  folder for neighbours.png and neighbours.csv (outputs/neighbours)
  weights      Inception weights, a pt_inception-2015-12-05-*.pth (default: those installed)
  overwrite    false: refuse a destination that holds these files (default) | true: replace them

neighbours.png has a row for each image: the image, its nearest by features, its nearest by pixels; mirrored where that
is nearer. neighbours.csv has the distances: Euclidean of the pool features, root mean square of pixel values 0..255.
"""

FILES = ("neighbours.png", "neighbours.csv")
BATCH = 64
MAX_SCALE = 1000  # reference images whose distance to their nearest other one is the scale
QUANTILE = 0.01  # of these distances; nearer than that is suspicious
COLUMN_GAP = 48  # in the picture, pixels


@dataclass
class NeighboursOptions:
    """The command line of this tool; see USAGE."""

    images: str = MISSING
    reference: str = MISSING
    subset: str = ""
    count: int = 32
    nearest: int = 3
    mirrored: bool = True
    destination: str = "outputs/neighbours"
    weights: str | None = None
    overwrite: bool = False


class Comparison(NamedTuple):
    """Neighbours of the images in one space; `scale` [S]: distances of reference images to their nearest other one."""

    found: Neighbours
    scale: Tensor


def opened(options: NeighboursOptions) -> tuple[ImageSet, ImageSet]:
    """The images and the reference, at one resolution. Errors: UserError that names the option."""
    for option in ("count", "nearest"):
        if (value := getattr(options, option)) < 1:
            raise UserError(f"{option}={value}: must be at least 1")
    images = open_image_set(options.images, "images")
    reference = open_image_set(options.reference, "reference", images.resolution, options.subset)
    if options.nearest >= len(reference):  # each reference image needs as many others
        raise UserError(
            f"nearest={options.nearest}: must be less than the number of reference images, which is {len(reference)}"
        )
    return images, reference


def read(images: ImageSet, indices: Sequence[int], description: str) -> Tensor:
    """Images of ascending indices as uint8 [N,3,H,W]."""
    batches = []
    with progress(description, len(indices)) as advance:
        for batch in images.batches(BATCH, indices):
            batches.append(batch)
            advance(len(batch))
    return torch.cat(batches)


def compare(
    images: Tensor, reference: ImageSet, inception: Inception, nearest: int, mirrored: bool
) -> dict[str, Comparison]:
    """Comparisons of images [Q,3,H,W] (uint8) with a reference of their size, in the spaces "features" and "pixels".

    Distances: Euclidean of the pool features; root mean square of differences of 8-bit values. Kept in memory are the
    features of the reference, and the pixels of the images and of at most MAX_SCALE reference images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_host(device)
    inception.to(device)
    scale = spread(min(MAX_SCALE, len(reference)), len(reference))
    own = torch.tensor([-1] * len(images) + scale)
    pixels = torch.cat([images, read(reference, scale, "reading the reference")])
    by_pixels = NearestSearch(pixels.to(device), nearest, own)
    kept: list[Tensor] = []
    with progress("reference", len(reference)) as advance:
        for batch in reference.batches(BATCH):
            views = torch.stack([batch, batch.flip(-1)] if mirrored else [batch]).to(device)
            by_pixels.update(views)
            kept.append(inception(views.flatten(0, 1)).pool.unflatten(0, views.shape[:2]).cpu())
            advance(len(batch))
    queries = []
    with progress("images", len(images)) as advance:
        for batch in images.split(BATCH):
            queries.append(inception(batch.to(device)).pool)
            advance(len(batch))
    queries.append(torch.stack([kept[index // BATCH][0, index % BATCH] for index in scale]).to(device))
    by_features = NearestSearch(torch.cat(queries), nearest, own)
    for features in kept:
        by_features.update(features.to(device))
    spaces = {"features": (by_features, 1.0), "pixels": (by_pixels, math.sqrt(images[0].numel()))}
    return {space: _comparison(search.compute(), len(images), unit) for space, (search, unit) in spaces.items()}


def _comparison(all_found: Neighbours, count: int, unit: float) -> Comparison:
    distances = all_found.distances / unit
    found = Neighbours(distances[:count], all_found.positions[:count], all_found.mirrored[:count])
    return Comparison(found, distances[count:, 0])


def picture(images: Tensor, reference: ImageSet, found: Sequence[Neighbours]) -> Image.Image:
    """One row an image [Q,3,H,W]: itself, then its neighbours of each space as compared; in columns, about square."""
    positions = torch.stack([space.positions for space in found])
    wanted, places = positions.unique(return_inverse=True)
    neighbours = read(reference, wanted.tolist(), "drawing")[places]
    mirrored = torch.stack([space.mirrored for space in found])[..., None, None, None]
    neighbours = torch.where(mirrored, neighbours.flip(-1), neighbours)
    spaces, count, nearest = positions.shape
    columns = max(1, round(math.sqrt(count / (1 + spaces * nearest))))
    rows = -(-count // columns)
    parts = []
    for start in range(0, count, rows):
        here = slice(start, start + rows)
        groups = [image_grid(group[here].flatten(0, 1), nearest) for group in neighbours]
        parts.append(side_by_side([image_grid(images[here], 1), *groups]))
    return side_by_side(parts, COLUMN_GAP)


def neighbours_csv(names: Sequence[str], reference: Sequence[str], comparisons: Mapping[str, Comparison]) -> str:
    """image, space, rank (from 1), neighbour, mirrored (true or false) and distance; a row a neighbour."""

    def rows() -> Iterator[Sequence[object]]:
        for index, name in enumerate(names):
            for space, (found, _) in comparisons.items():
                ranks = zip(*(column[index].tolist() for column in found), strict=True)
                for rank, (distance, position, mirrored) in enumerate(ranks, 1):
                    yield name, space, rank, reference[position], str(mirrored).lower(), distance

    return csv_text(["image", "space", "rank", "neighbour", "mirrored", "distance"], rows())


def report(comparisons: Mapping[str, Comparison]) -> None:
    """Print a column for each space: distances of the images, those in the reference, how many images are too near."""
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
        within = int((distances <= limit).sum())  # "<=": a copy's 0 counts where duplicates make the quantile 0
        numbers = (distances.quantile(0.5), distances.min(), scale.quantile(0.5), limit, scale.min())
        columns.append([space, *(f"{number:.4g}" for number in numbers), f"{within} of {len(distances)}"])
    width = max(map(len, titles))
    for title, *cells in zip(titles, *columns, strict=True):
        print(f"{title:<{width}}" + "".join(f"{cell:>14}" for cell in cells))


def analyse(options: NeighboursOptions) -> None:
    """Write neighbours.png and neighbours.csv, print the table. Errors: UserError that names the option."""
    destination = Path(options.destination).expanduser()
    for file in FILES:
        refuse_existing(destination / file, "destination", options.overwrite)
    images, reference = opened(options)
    inception = Inception(options.weights, "weights")
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"destination={options.destination}: is no folder and cannot become one ({error.strerror}); choose another"
        ) from error
    chosen = spread(min(options.count, len(images)), len(images))
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


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], USAGE, NeighboursOptions, analyse))
