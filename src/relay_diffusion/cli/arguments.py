"""Command lines of key=value arguments."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relay_diffusion.errors import UserError
from relay_diffusion.utils.messages import did_you_mean

Options = TypeVar("Options")


def parse_arguments(schema: type[Options], arguments: Sequence[str]) -> Options:
    """Parse key=value arguments into a `schema` dataclass.

    Raises UserError for an unknown key (with the nearest one), a value of the wrong type, a missing key.
    """
    known = [field.name for field in fields(cast(Any, schema))]
    hints = get_type_hints(schema)
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not of the form key=value; keys: {', '.join(known)}")
        if key not in known:
            raise UserError(f"unknown key {key!r}{did_you_mean(key, known)}")
        values[key] = value
    config = OmegaConf.structured(schema)
    for key, value in values.items():
        try:
            config[key] = value
        except OmegaConfBaseException as error:
            raise UserError(f"{key}={value}: {_expected(hints[key])}") from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"missing: {', '.join(f'{key}=...' for key in missing)}")
    return cast(Options, OmegaConf.to_object(config))


def _expected(hint: Any) -> str:
    """Describe the values of a type, as "must be a whole number"."""
    from relay_diffusion.config.parts import KINDS  # keep --help fast

    kind = next((part for part in get_args(hint) if part is not type(None)), hint)
    if issubclass(kind, Enum):
        names = list(kind.__members__)
        return f"use one of {', '.join(names)}" if len(names) > 2 else f"use {' or '.join(names)}"
    return "use true or false" if kind is bool else f"must be {KINDS[kind]}"


def listed(text: str) -> list[str]:
    """Parse "a,b" or "[a,b]" as ["a", "b"]; empty names are left out."""
    return [name.strip() for name in text.strip("[]").split(",") if name.strip()]


def positive_numbers(option: str, text: str, remedy: str) -> tuple[float, ...]:
    """Parse "0.5,1,2" as (0.5, 1.0, 2.0).

    Raises UserError unless all numbers are positive and finite.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values):
        raise UserError(f"{option}={text}: {remedy}")
    return values


def run_tool(arguments: Sequence[str], usage: str, schema: type[Options], action: Callable[[Options], None]) -> int:
    """Run a key=value command and return its exit code.

    0, or 2 after an error message of one line.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage, end="")
        return 0
    try:
        action(parse_arguments(schema, arguments))
        return 0
    except (UserError, OSError) as error:
        text = str(error)
    except Exception as error:
        from relay_diffusion.cli.errors import caused_by_user, explain  # keep --help fast
        from relay_diffusion.config import CONF

        if not caused_by_user(error):
            raise
        text = explain(error, CONF / "sample.yaml")
    print(f"error: {text}", file=sys.stderr)
    return 2
