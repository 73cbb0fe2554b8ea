"""Class labels: dataset.json, and the choice of classes."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relay_diffusion.data.sources import LABEL_FILE, Source, one_line, open_images
from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.errors import UserError

AS_REFERENCE = "reference"  # class=reference: each class as often as in the reference


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


def labels_like_reference(path: str | Path, subset: str, names: Sequence[str], option: str) -> list[int]:
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


MAX_CLASSES = 1_000_000  # a larger label is a mistake, and would fill the memory with names


@dataclass(frozen=True)
class Labels:
    """Class index of every image, and the class names in the order of their index."""

    by_name: dict[str, int]
    class_names: list[str]


def read_labels(source: Source) -> Labels | None:
    """Labels of `dataset.json`: {"labels": [[name, class], ...], "classes": [class name, ...] (optional)}.

    None when the file is absent or has no labels. Errors: UserError naming the file and the entry for anything
    malformed, for a label of a missing image, and for an image without a label.
    """
    if LABEL_FILE not in source.members:
        return None
    where = f"{source.option}={source.path}: {LABEL_FILE}"
    try:
        content = json.loads(source.read(LABEL_FILE))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f'{where} must be an object with the key "labels"')
    entries, classes = content.get("labels"), content.get("classes")
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise UserError(f'{where}: "labels" must be a list of [name, class index]')
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise UserError(f'{where}: "classes" must be a list of class names')
    images, by_name = set(source.names), {}
    for index, entry in enumerate(entries):
        match entry:
            case [str(name), int(label)] if not isinstance(label, bool):
                pass
            case _:
                raise UserError(f"{where}: labels[{index}] = {reprlib.repr(entry)} must be [name, class index]")
        if name not in images:
            raise UserError(f"{where}: labels[{index}] is for {name!r}, which is not among the images")
        if name in by_name:
            raise UserError(f"{where}: labels[{index}] labels {name!r} a second time")
        if not 0 <= label < MAX_CLASSES or (classes is not None and label >= len(classes)):
            limit = f"0..{(MAX_CLASSES if classes is None else len(classes)) - 1}"
            said = "no class is named" if classes == [] else f"class {reprlib.repr(label)} must be {limit}"
            raise UserError(f"{where}: labels[{index}], {name!r}: {said}")
        by_name[name] = label
    for name in source.names:
        if name not in by_name:
            raise UserError(f'{where}: "labels" has no entry for {name!r}')
    return Labels(by_name, classes or [str(index) for index in range(max(by_name.values()) + 1)])
