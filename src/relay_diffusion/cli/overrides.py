"""The words of a command line, before Hydra reads them. Imports neither torch nor lightning."""

from __future__ import annotations

import argparse
import re
from importlib.metadata import version
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from relay_diffusion import __version__
from relay_diffusion.errors import UserError

PACKAGES = {"hydra": "hydra-core", "torch": "torch", "lightning": "lightning"}  # whose versions results depend on


def arranged(words: list[str]) -> list[str]:
    """The same words with all flags, as --multirun, behind the options: Hydra takes no options on both sides of one."""
    options = [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    return options + [word for word in words if word not in options]


def parse(words: list[str]) -> argparse.Namespace:
    """Hydra's reading of arranged words. Raises UserError for a flag that it does not know."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        arguments, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (--help lists what can be set)") from None
    if unknown:
        following = words[words.index(unknown[0]) + 1 :][:1]  # `--seeds 3`
        name, _, value = unknown[0].lstrip("-").partition("=")
        value = value or next((word for word in following if not word.startswith("-") and "=" not in word), "VALUE")
        raise UserError(f"{unknown[0]}: options are KEY=VALUE, as {name or 'KEY'}={value}")
    return arguments


def accepted_groups(config: Path) -> list[str]:
    """The config groups of a command: those of the defaults list of its yaml."""
    entries = [entry for entry in OmegaConf.load(config).defaults if isinstance(entry, DictConfig)]
    return sorted(str(group) for entry in entries for group in entry if not str(group).startswith("override "))


def check_added(words: list[str], config: Path) -> None:
    """Raise UserError for +KEY=VALUE with a new KEY of no group: nothing would read it."""
    known = {*map(str, OmegaConf.load(config)), *accepted_groups(config)}
    for word in words:
        key = re.match(r"\++(\w+)", word)
        if key and key[1] not in known:
            raise UserError(not_an_option(key[1], config))


def not_an_option(key: str, config: Path) -> str:
    """Say that a command has no such option; for a group of another command with the groups of this one."""
    if (config.parent / key).is_dir():
        return f"{key} is no group of {config.stem}.py; its groups are {', '.join(accepted_groups(config))}"
    return f"{key} is not an option"


def versions() -> str:
    """One line: this package and what it stands on."""
    others = ", ".join(f"{name} {version(package)}" for name, package in PACKAGES.items())
    return f"relay-diffusion {__version__} ({others})"


def unreadable(error: HydraException) -> str | None:
    """The user's words for an override that Hydra cannot read; None if it is about something else."""
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals or not re.fullmatch(r"[+~]*[\w./@:$-]+", key):
            return f"{error.override}: options are KEY=VALUE, as seeds=0-7"
        if value.startswith(("[", "{")):
            return (
                f"{error.override} cannot be read: brackets must close, and texts with spaces or special characters in "
                "them need quotes, as \"['a & b',c]\""
            )
        return (
            f"{error.override} cannot be read: a value with spaces or special characters needs quotes inside: "
            f"{_quoted(key, value)}"
        )
    found = re.match(r"Ambiguous value for argument '(.*)'\s+1\. ", str(error), re.S)
    if found:
        key, _, value = found[1].partition("=")
        return (
            f"{found[1]}: a list is {key}=[{value}], a text {_quoted(key, value)} (commas without brackets are for "
            "--multirun)"
        )
    return None


def _quoted(key: str, value: str) -> str:
    """As it is typed into a shell: its quotes outside, Hydra's inside."""
    return f'''"{key}='{value.replace("'", chr(92) + "'")}'"'''
