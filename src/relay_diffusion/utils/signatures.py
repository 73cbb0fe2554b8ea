"""Check the methods of a user's class before they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from relay_diffusion.errors import UserError


def check_arguments(
    where: str, method: Callable[..., Any], arguments: Sequence[str], keywords: Sequence[str] = ()
) -> None:
    """Raise UserError unless a method takes these arguments.

    where: names the method in the message. arguments: names of the positional ones; a method may name them otherwise.
    A method without a signature, as some of C have, is accepted.
    """
    try:
        inspect.signature(method).bind(*arguments, **dict.fromkeys(keywords))
    except TypeError as error:
        named = ", ".join([*arguments, *(f"{name}=" for name in keywords)])
        raise UserError(f"{where} must take the arguments ({named}): {error}") from None
    except ValueError:
        return
