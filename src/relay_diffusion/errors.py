"""The one exception that means "the user can mend this": the command line prints it as one line, exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in an option, a file or a combination of them; the message names it and the remedy."""


@contextmanager
def naming(option: str) -> Iterator[None]:
    """What is wrong with a file, a UserError from within, is said with the option that gave the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)
