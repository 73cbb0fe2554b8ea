"""Nearest training images of generated images.

By Inception features and by pixels. Comparison with the distances among training images detects copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from relay_diffusion.analysis.tables import csv_text
from relay_diffusion.data.image_sets import ImageSet, evenly_spaced
from relay_diffusion.metrics.inception import Inception
from relay_diffusion.metrics.neighbours import NearestSearch, Neighbours
from relay_diffusion.utils.host import prepare_host
from relay_diffusion.utils.pictures import image_grid, pil_image, side_by_side
from relay_diffusion.utils.progress import progress

BATCH = 64
MAX_SCALE = 1000  # reference images whose nearest-neighbor distances are the scale
QUANTILE = 0.01  # of these distances; smaller distances suggest copies
COLUMN_GAP = 48  # pixels


class Comparison(NamedTuple):
    """Neighbors of the images in one space.

    scale [S]: distances of reference images to their nearest other one.
    """

    found: Neighbours
    scale: Tensor


def read(images: ImageSet, indices: Sequence[int], description: str) -> Tensor:
    """Read images of ascending indices as uint8 [N,3,H,W]."""
    batches = []
    with progress(description, len(indices)) as advance:
        for batch in images.batches(BATCH, indices):
            batches.append(batch)
            advance(len(batch))
    return torch.cat(batches)


def compare(
    images: Tensor, reference: ImageSet, inception: Inception, nearest: int, mirrored: bool
) -> dict[str, Comparison]:
    """Compare uint8 images [Q,3,H,W] with a reference of their size.

    Returns a Comparison for "features" and one for "pixels". Distances: Euclidean of the pool features; root mean
    square difference of 8-bit values. Memory holds the features of the reference, and the pixels of the images and of
    at most MAX_SCALE reference images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_host(device)
    inception.to(device)
    scale = evenly_spaced(min(MAX_SCALE, len(reference)), len(reference))
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


def nearest_table(
    images: Tensor, names: Sequence[str], reference: ImageSet, comparisons: Mapping[str, Comparison]
) -> tuple[list[str], list[list[Any]]]:
    """Tabulate images [Q,3,H,W] with the nearest reference image in each space.

    Returns columns and rows; pictures are PIL images. A neighbor is mirrored if that is nearer.
    """
    columns = ["image", "name"]
    rows: list[list[Any]] = [[pil_image(image), name] for image, name in zip(images, names, strict=True)]
    for space, (found, _) in comparisons.items():
        columns += [f"nearest by {space}", f"name by {space}", f"distance by {space}"]
        for row, position, mirrored, distance in zip(
            rows, *(column[:, 0].tolist() for column in (found.positions, found.mirrored, found.distances)), strict=True
        ):
            pixels = reference.tensor(position)
            row += [pil_image(pixels.flip(-1) if mirrored else pixels), reference.names[position], distance]
    return columns, rows


def picture(images: Tensor, reference: ImageSet, found: Sequence[Neighbours]) -> Image.Image:
    """Draw images [Q,3,H,W] beside their neighbors in each space.

    One row per image, in as many columns as make the picture about square.
    """
    positions = torch.stack([space.positions for space in found])
    wanted, places = positions.unique(return_inverse=True)
    neighbors = read(reference, wanted.tolist(), "drawing")[places]
    mirrored = torch.stack([space.mirrored for space in found])[..., None, None, None]
    neighbors = torch.where(mirrored, neighbors.flip(-1), neighbors)
    spaces, count, nearest = positions.shape
    columns = max(1, round(math.sqrt(count / (1 + spaces * nearest))))
    rows = -(-count // columns)
    parts = []
    for start in range(0, count, rows):
        here = slice(start, start + rows)
        groups = [image_grid(group[here].flatten(0, 1), nearest) for group in neighbors]
        parts.append(side_by_side([image_grid(images[here], 1), *groups]))
    return side_by_side(parts, COLUMN_GAP)


def neighbours_csv(names: Sequence[str], reference: Sequence[str], comparisons: Mapping[str, Comparison]) -> str:
    """Format the neighbors as CSV, one row per neighbor.

    Columns: image, space, rank (from 1), neighbour, mirrored (true or false), distance.
    """

    def rows() -> Iterator[Sequence[object]]:
        for index, name in enumerate(names):
            for space, (found, _) in comparisons.items():
                ranks = zip(*(column[index].tolist() for column in found), strict=True)
                for rank, (distance, position, mirrored) in enumerate(ranks, 1):
                    yield name, space, rank, reference[position], str(mirrored).lower(), distance

    return csv_text(["image", "space", "rank", "neighbour", "mirrored", "distance"], rows())
