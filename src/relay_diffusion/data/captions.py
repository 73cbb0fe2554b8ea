"""Captions of dataset.json; imports no torch."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from relay_diffusion.data.labels import describe_file
from relay_diffusion.data.sources import Source
from relay_diffusion.errors import UserError

MAX_CAPTIONS = 1_000  # of one image
MAX_LENGTH = 10_000  # characters of one caption; text encoders read a few hundred


def read_captions(source: Source) -> dict[str, list[str]]:
    """Read the captions of a source's dataset.json by image name.

    {"captions": [[name, caption or [caption, ...]], ...]}. Blank captions count as missing; images without captions
    have no entry in the result. Raises UserError naming the file and the entry for anything malformed, and for captions
    of a missing image.
    """
    entries, where = source.caption_entries(), describe_file(source)
    if entries is None:
        return {}
    if not isinstance(entries, list):
        raise UserError(f'{where}: "captions" must be a list of [name, caption or list of captions]')
    images, by_name = set(source.names), {}
    for index, entry in enumerate(entries):
        match entry:
            case [str(name), (str() | list()) as value]:
                pass
            case _:
                shown = reprlib.repr(entry)
                raise UserError(f"{where}: captions[{index}] = {shown} must be [name, caption or list of captions]")
        if name not in images:
            raise UserError(f"{where}: captions[{index}] is for {name!r}, which is not among the images")
        if name in by_name:
            raise UserError(f"{where}: captions[{index}] repeats {name!r}; remove one entry")
        by_name[name] = checked_captions(value, f"{where}: captions[{index}], {name!r}")
    return {name: captions for name, captions in by_name.items() if captions}


def checked_captions(value: object, where: str) -> list[str]:
    """Return the captions of one image, stripped and without blank ones.

    value: a caption or a list of captions. where: names it in messages. Raises UserError for values that are no text,
    for text that UTF-8 cannot encode or that contains NUL, and above the limits on number and length.
    """
    captions: Sequence[object] = value if isinstance(value, list) else [value]
    if len(captions) > MAX_CAPTIONS:
        raise UserError(f"{where}: {len(captions):,} captions; use at most {MAX_CAPTIONS:,}")
    return [text for caption in captions if (text := _checked(caption, where))]


def _checked(caption: object, where: str) -> str:
    """Return one caption, stripped; raise UserError if it is no usable text."""
    if not isinstance(caption, str):
        raise UserError(f"{where}: the caption {reprlib.repr(caption)} must be text")
    text = caption.strip()
    if len(text) > MAX_LENGTH:
        raise UserError(f"{where}: a caption has {len(text):,} characters; use at most {MAX_LENGTH:,}")
    if "\0" in text or text.encode(errors="ignore").decode() != text:  # JSON can hold surrogates, which UTF-8 cannot
        raise UserError(f"{where}: the caption {reprlib.repr(caption)} contains NUL or a lone surrogate; correct it")
    return text
