"""Errors of the user, which commands report in one line with exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Mistake in an option or a file; the message names it and the remedy."""


@contextmanager
def prefix_errors(option: str) -> Iterator[None]:
    """Prefix the message of a UserError in this block with an option."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)
