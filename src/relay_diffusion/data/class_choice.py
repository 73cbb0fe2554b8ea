"""Choice of classes and captions to sample.

By names, indices, or in the proportions of a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from relay_diffusion.data.captions import read_captions
from relay_diffusion.data.labels import read_labels
from relay_diffusion.data.sources import open_source
from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.errors import UserError, prefix_errors
from relay_diffusion.utils.messages import did_you_mean, shorten

AS_REFERENCE = "reference"  # class=reference: each class as often as in the reference; prompt=reference: its captions

Item = TypeVar("Item")


def class_indices(chosen: object, num_classes: int, names: Sequence[str]) -> list[int]:
    """Resolve classes by name or number, one or a list.

    None means all classes, -1 no class; an unconditional model gives [-1]. Raises UserError for a class that the model
    does not have.
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
            raise UserError(f"class={entry}: the model has no classes; use class=null")
        elif text in names:
            indices.append(list(names).index(text))
        elif text.isdecimal() and len(text) < 10 and int(text) < num_classes:
            indices.append(int(text))
        else:
            numbers = f"0 to {num_classes - 1}"
            every = f"use one of {', '.join(names)} (or as numbers {numbers})" if names else f"use {numbers}"
            nearest = did_you_mean(text[:80], names, f"; {every}")
            raise UserError(f"class={shorten(text)} is not known to the model{nearest}")
    if not indices:
        raise UserError("class=[]: is empty; use class=null for all classes in turn")
    return indices


def labels_like_reference(
    path: str | Path, subset: str, num_classes: int, names: Sequence[str], option: str
) -> list[int]:
    """Return an image set's class indices in fixed random order.

    Any part of them has about the same class proportions.
    Raises UserError for a set without classes, or with classes other than the model's, which may have no `names`.
    """
    source = open_source(path, option)
    labels = read_labels(source)
    if labels is None or len(labels.class_names) > num_classes or (names and labels.class_names != list(names)):
        problem = "has no classes (dataset.json)" if labels is None else "has other classes than the model"
        raise UserError(f"class={AS_REFERENCE}: {option}={path} {problem}: name classes instead")
    with prefix_errors(f"class={AS_REFERENCE}"):
        found = [labels.by_name[name] for name in source.names_in(subset)]
    return _mixed(found)


def captions_like_reference(path: str | Path, subset: str, option: str) -> list[str]:
    """Return the first caption of each image in fixed random order.

    The order is that of `labels_like_reference`, so classes and captions belong together. "" for an image without
    captions. Raises UserError for a set in which no image has one.
    """
    source = open_source(path, option)
    captions = read_captions(source)
    with prefix_errors(f"prompt={AS_REFERENCE}"):
        names = source.names_in(subset)
    found = [captions.get(name, [""])[0] for name in names]
    if not any(found):
        raise UserError(
            f"prompt={AS_REFERENCE}: {option}={path} has no captions (dataset.json); write prompts or use another one"
        )
    return _mixed(found)


def _mixed(items: Sequence[Item]) -> list[Item]:
    """Return items in a random order that depends on their number only."""
    return [items[k] for k in np.random.default_rng(0).permutation(len(items))]
