"""Parse seeds: numbers and ranges. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from relay_diffusion.errors import UserError
from relay_diffusion.utils.messages import shorten

MAX_SEED = 2**63 - 1
MAX_IMAGES = 10_000_000  # images of one run; a plan of more takes gigabytes


def parse_seeds(text: object, option: str = "seeds") -> list[int]:
    """Parse seeds: 0-3,7 is [0, 1, 2, 3, 7].

    option: key for messages. Raises UserError for other formats, repeated seeds, and more than MAX_IMAGES seeds.
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
            raise UserError(f"{option}={shorten(text)}: use numbers and ranges, e.g. seeds=0-31 or seeds=[0-7,12]")
        low, high = int(first), int(last if dash else first)
        if max(low, high) > MAX_SEED:
            raise UserError(f"{option}: {shorten(part.strip())} is too large; a seed must be at most {MAX_SEED}")
        if high < low:
            raise UserError(f"{option}: the range {part.strip()} descends; write the lower number first")
        ranges.append(range(low, high + 1))
        count += high + 1 - low
    if not ranges:
        raise UserError(f"{option} is empty: use numbers and ranges, e.g. seeds=0-31")
    if count > MAX_IMAGES:
        raise UserError(f"{option}={shorten(text)}: {count:,} images; a run makes at most {MAX_IMAGES:,}")
    seeds = [seed for numbers in ranges for seed in numbers]
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{option}={shorten(text)}: a seed is repeated; list each seed once")
    return seeds


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 100  # int() raises for thousands of digits
