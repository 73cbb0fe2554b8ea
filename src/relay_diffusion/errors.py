"""User errors, which commands report in one line with exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Wrong option or file.

    The message names the option or file, what is wrong and what to do.
    """


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
