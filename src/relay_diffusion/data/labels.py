"""Class labels of dataset.json; imports no torch."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

from relay_diffusion.data.sources import Source
from relay_diffusion.errors import UserError

MAX_CLASSES = 1_000_000  # a larger label is a mistake, and its class names would exhaust the memory


@dataclass(frozen=True)
class Labels:
    """Class index of every image, and the ordered class names."""

    by_name: dict[str, int]
    class_names: list[str]


def describe_file(source: Source) -> str:
    """Return how messages name the dataset.json of a source.

    Other formats have something else instead.
    """
    return f"{source.option}={source.path}: {source.described_in}"


def read_labels(source: Source) -> Labels | None:
    """Read the labels of a source's dataset.json.

    {"labels": [[name, class], ...], "classes": [class name, ...] (optional)}. None when the file is missing or has no
    labels. Raises UserError naming the file and the entry for anything malformed, for a label of a missing image, and
    for an image without a label.
    """
    (entries, classes), where = source.label_entries(), describe_file(source)
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
            raise UserError(f"{where}: labels[{index}] repeats {name!r}; remove one entry")
        if not 0 <= label < MAX_CLASSES or (classes is not None and label >= len(classes)):
            limit = f"0..{(MAX_CLASSES if classes is None else len(classes)) - 1}"
            said = "no class is named" if classes == [] else f"class {reprlib.repr(label)} must be {limit}"
            raise UserError(f"{where}: labels[{index}], {name!r}: {said}")
        by_name[name] = label
    for name in source.names:
        if name not in by_name:
            raise UserError(f'{where}: "labels" has no entry for {name!r}')
    return Labels(by_name, classes or [str(index) for index in range(max(by_name.values()) + 1)])
