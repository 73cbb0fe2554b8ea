"""Parse seeds: numbers and ranges. Imports no torch: seeds are checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence

from relay_diffusion.errors import UserError
from relay_diffusion.utils.messages import shorten

MAX_SEED = 2**63 - 1
MAX_IMAGES = 10_000_000  # of one run: a plan of them takes gigabytes


def parse_seeds(text: object, option: str = "seeds") -> list[int]:
    """Parse seeds: 0-3,7 is [0, 1, 2, 3, 7]. `option`: the name for messages.

    Raises UserError for anything else, for seeds named twice, and for more than MAX_IMAGES.
    """
    parts = (
        [str(seed) for seed in text]
        if isinstance(text, Sequence) and not isinstance(text, str)
        else str(text).split(",")
    )
    ranges, count = [], 0
    for part in parts:
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise UserError(f"{option} is {shorten(text)}: give numbers and ranges, e.g. seeds=0-31 or seeds=[0-7,12]")
        low, high = int(first), int(last if dash else first)
        if max(low, high) > MAX_SEED:
            raise UserError(f"{option} holds {shorten(part.strip())}: the largest seed is {MAX_SEED}")
        if high < low:
            raise UserError(f"{option} holds the range {part.strip()!r}, which runs backwards")
        ranges.append(range(low, high + 1))
        count += high + 1 - low
    if not ranges:
        raise UserError(f"{option} is empty: give numbers and ranges, e.g. seeds=0-31")
    if count > MAX_IMAGES:
        raise UserError(f"{option} is {shorten(text)}: {count:,} images, more than {MAX_IMAGES:,} at once")
    seeds = [seed for numbers in ranges for seed in numbers]
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{option} is {shorten(text)}: a seed is named twice")
    return seeds


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 100  # Python refuses to read numbers of thousands of digits
