"""The plan of a sampling run: which images are made, from which seeds, classes and starting images."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relay_diffusion.data.images import ImageDataset
from relay_diffusion.data.sources import open_images, read_labels
from relay_diffusion.data.zip_writer import png_names
from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.errors import UserError
from relay_diffusion.seeds import parse_seeds

AS_REFERENCE = "reference"  # class=reference: each class as often as in the reference
FOLDER_SIZE = 1000  # images in one sub-folder


def class_indices(chosen: object, num_classes: int, names: Sequence[str]) -> list[int]:
    """Classes by name or number, one or a list of them; none means all, -1 no class; [-1] without classes.

    Raises UserError for a class that the model does not know.
    """
    if chosen is None:
        return list(range(num_classes)) or [NO_CLASS]
    entries = list(chosen) if isinstance(chosen, Sequence) and not isinstance(chosen, str) else [chosen]
    indices = []
    for entry in entries:
        text = str(entry)
        if text == str(NO_CLASS):
            indices.append(NO_CLASS)
        elif not num_classes:
            raise UserError(f"class={entry} was given, but the model is unconditional: leave it out (class=null)")
        elif text in names:
            indices.append(list(names).index(text))
        elif text.isdecimal() and len(text) < 10 and int(text) < num_classes:
            indices.append(int(text))
        else:
            raise UserError(f"class={text[:80]} is not known to the model; {_known(text[:80], num_classes, names)}")
    if not indices:
        raise UserError("class=[] names no class: leave it out (class=null) for all in turn")
    return indices


def _known(text: str, num_classes: int, names: Sequence[str]) -> str:
    """The class that may have been meant, or else all that there are."""
    spelt = {name.lower(): name for name in names}
    close = difflib.get_close_matches(text.lower(), list(spelt), n=1)
    if close:
        return f"did you mean {spelt[close[0]]}?"
    numbers = f"0 to {num_classes - 1}"
    return f"it knows {', '.join(names)} (or as numbers {numbers})" if names else f"it knows {numbers}"


def in_proportion(path: str | Path, subset: str, names: Sequence[str], option: str) -> list[int]:
    """The classes of an image set in an order in which any stretch holds them about as often as all of it.

    Always the same order. Raises UserError for a set without classes, or with others than the model's `names`.
    """
    source = open_images(path, option)
    labels = read_labels(source)
    if labels is None or (names and labels.class_names != list(names)):
        there = "has no classes (dataset.json)" if labels is None else "has other classes than the model"
        raise UserError(f"class={AS_REFERENCE}: {option}={path} {there}: name classes instead")
    found = [labels.by_name[name] for name in source.names if not subset or name.startswith(f"{subset.strip('/')}/")]
    if not found:
        raise UserError(f"class={AS_REFERENCE}: {option}={path} holds nothing in {subset}")
    return [found[k] for k in np.random.default_rng(0).permutation(len(found))]


@dataclass(frozen=True)
class Plan:
    """The images of a run in order: names (paths without .png), seeds and labels (-1: no class).

    start: the images to start from, number k for seed k; None: noise.
    """

    names: list[str]
    seeds: list[int]
    labels: list[int]
    start: ImageDataset | None = None


def plan_from_noise(seeds: object, classes: Sequence[int]) -> Plan:
    """One image a seed; the classes in turn by seed, as the authors do."""
    chosen = parse_seeds(seeds)
    names = [f"{seed // FOLDER_SIZE * FOLDER_SIZE:08d}/seed{seed:08d}" for seed in chosen]
    return Plan(names, chosen, [classes[seed % len(classes)] for seed in chosen])


def plan_from_images(start: ImageDataset, seeds: object, classes: Sequence[int] | None) -> Plan:
    """One image for each of the given ones, under its own name; image number k has seed k.

    `seeds` chooses some of them by number (null: all). Without `classes` each image has the class of its
    dataset.json, or none. Raises UserError for numbers that are not there, and for two images that would share a file.
    """
    chosen = list(range(len(start.names))) if seeds is None else parse_seeds(seeds)
    if max(chosen) >= len(start.names):
        raise UserError(
            f"seeds={seeds}: relay.start={start.path} holds {len(start.names)} images, numbers 0 to "
            f"{len(start.names) - 1}"
        )
    names = png_names(start.names)
    if len(set(names.values())) < len(names):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        raise UserError(f"relay.start={start.path}: two of its images would be written as {twice}: rename one")
    labels = start.labels if classes is None else [classes[k % len(classes)] for k in range(len(start.names))]
    chosen_names = [names[start.names[k]].removesuffix(".png") for k in chosen]
    return Plan(chosen_names, chosen, [labels[k] for k in chosen], start)
