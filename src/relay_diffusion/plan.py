"""The plan of a sampling run: which images are made, from which seeds, classes and starting images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from relay_diffusion.data.images import ImageDataset
from relay_diffusion.data.zip_writer import png_names
from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.errors import UserError

FOLDER_SIZE = 1000  # images in one sub-folder
MAX_SEED = 2**63 - 1


def parse_seeds(text: object) -> list[int]:
    """Seeds named by a text: 0-3,7 is [0, 1, 2, 3, 7].

    Raises UserError for anything else, and for seeds named twice.
    """
    parts = (
        [str(seed) for seed in text]
        if isinstance(text, Sequence) and not isinstance(text, str)
        else str(text).split(",")
    )
    seeds: list[int] = []
    for part in parts:
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"seeds is {text!r}: give numbers and ranges, e.g. seeds=0-31 or seeds=[0-7,12]")
        if max(int(first), int(last or 0)) > MAX_SEED:
            raise UserError(f"seeds holds {part.strip()!r}: the largest seed is {MAX_SEED}")
        if dash and int(last) < int(first):
            raise UserError(f"seeds holds the range {part.strip()!r}, which runs backwards")
        seeds.extend(range(int(first), int(last if dash else first) + 1))
    if not seeds:
        raise UserError("seeds names none: give numbers and ranges, e.g. seeds=0-31")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"seeds is {text!r}: a seed is named twice")
    return seeds


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
        elif text.isdigit() and int(text) < num_classes:
            indices.append(int(text))
        else:
            known = ", ".join(names) if names else f"0 to {num_classes - 1}"
            raise UserError(f"class={entry} is not known to the model; it knows {known}")
    if not indices:
        raise UserError("class=[] names no class: leave it out (class=null) for all in turn")
    return indices


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
