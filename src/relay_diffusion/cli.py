"""Command lines: mistakes end as one clear line and exit code 2, never as a traceback."""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relay_diffusion.errors import UserError
from relay_diffusion.launch import leave_group, rank, ranks_differ
from relay_diffusion.overrides import arranged, parse, unreadable, versions
from relay_diffusion.sweep import check_sweep

FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch: set it to 1 to see tracebacks
FIRST_RANK_SECONDS = 3
SHOW_TRACEBACK = "RELAY_DIFFUSION_TRACEBACK"  # the user's setting of it


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, DictConfig):
        for key in map(str, node):
            if key.startswith("_"):
                continue
            yield f"{prefix}{key}"
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from _keys(node._get_node(key), f"{prefix}{key}.")


def nearest(name: str, known: list[str]) -> str:
    """ " Did you mean ...?", or nothing if nothing is close."""
    same_word = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]  # in another place
    matches = same_word or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def _known_keys(config: Path, unknown: str) -> list[str]:
    """Every key of the config, with the group choices of this command line if they can be composed."""
    choices = [a for a in sys.argv[1:] if re.fullmatch(r"[a-z_]+=\w+", a)]
    groups = [choice for choice in choices if not choice.startswith(f"{unknown}=")]
    for overrides in (groups, []):
        try:
            with initialize_config_dir(str(config.parent.resolve()), version_base="1.3"):
                return list(_keys(compose(config.stem, overrides=overrides)))
        except (HydraException, OmegaConfBaseException):
            continue
    return []


def _unknown_override(message: str, config: Path) -> str | None:
    """The user's words for Hydra's refusal of an override, with the nearest key or choice."""
    found = re.search(r"Could not override '([^']+)'", message)
    if found:
        name = found[1].lstrip("+~")
        return f"{name} is not an option{nearest(name, _known_keys(config, name))}"
    found = re.search(r"Could not find '([^']+)'", message)
    if found:
        group, _, name = found[1].rpartition("/")
        listed = message.partition("Available options in")[2]
        choices = [line.strip() for line in listed.splitlines()[1:] if line.strip() and " " not in line.strip()]
        options = f"; it can be {', '.join(choices)}" if choices else ""
        return f"{group}={name} is not there{nearest(name, choices) or options}"
    return None


def explain(error: Exception, config: Path) -> str:
    """An error of the user's making as one line."""
    text = str(error).rpartition("UserError: ")[2]  # a data worker sends its traceback along
    if isinstance(error, InstantiationException):
        cause = error.__cause__
        key = re.search(r"full_key: (\S+)", text)
        text = f"{key[1]}: {cause}" if cause and key and not isinstance(cause, UserError) else str(cause or text)
        return " ".join(text.split())
    if isinstance(error, HydraException):
        text = unreadable(error) or _unknown_override(text, config) or text
    refused = re.search("UserError raised while resolving interpolation: (.*)", text)
    if refused:
        text = refused[1]
    elif isinstance(error, OmegaConfBaseException) and error.full_key:
        text = f"{error.full_key}: {text.splitlines()[0]}"
    return " ".join(text.split())


def _caused_by_user(error: Exception) -> bool:
    return isinstance(error, UserError | HydraException | OmegaConfBaseException)  # among them: a class refused


_failures: list[Exception] = []
_begun: list[bool] = []  # not empty once Hydra has made the directory of the run


@contextmanager
def clear_errors() -> Iterator[None]:
    """Inside a Hydra main function: keep a user's mistake for `command_line`, before Hydra reports on it."""
    _begun.append(True)
    try:
        yield
    except Exception as error:
        if os.environ.get(SHOW_TRACEBACK) == "1" or not (_caused_by_user(error) or _lost_a_rank(error)):
            raise
        if _lost_a_rank(error):
            error = UserError("another process of this run has failed, and says why")
        if rank() == 0 or ranks_differ():
            _failures.append(error)
        else:
            time.sleep(FIRST_RANK_SECONDS)  # the first rank says the same, before a launcher ends all for this one
            raise SystemExit(2) from None
        _remove_if_empty(Path(HydraConfig.get().runtime.output_dir))


def _lost_a_rank(error: Exception) -> bool:
    """Whether a rank failed because another one had left."""
    return ranks_differ() and isinstance(error, RuntimeError) and "by peer" in str(error)


def _remove_if_empty(directory: Path) -> None:
    """Take away the directory that Hydra made for a run that did not begin."""
    with suppress(OSError):  # another rank may be quicker; a directory with files stays
        directory.rmdir()


def command_line(main: Callable[[], Any], config: Path, validate: Callable[[DictConfig], None]) -> NoReturn:
    """Run a Hydra main function; the user's mistakes become one line on standard error and exit code 2.

    `config`: the yaml that the function composes; `validate` is its check, here for the jobs of a sweep. With
    HYDRA_FULL_ERROR=1 every error keeps its traceback. Without a word it prints what it can do.
    """
    sys.argv[1:] = arranged(sys.argv[1:] or ["--help"])
    if "--version" in sys.argv:
        print(versions())
        sys.exit(0)
    os.environ.setdefault(SHOW_TRACEBACK, os.environ.get(FULL_ERROR, "0"))  # processes that this one starts inherit it
    os.environ[FULL_ERROR] = "1"  # let errors through to here
    try:
        check_sweep(parse(sys.argv[1:]), config, validate)
        main()
        sys.stdout.flush()
        if not _failures:
            leave_group()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # threads and other processes may wait for this one
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains on its way out
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if isinstance(error, OSError | ValueError) and not _begun and not _caused_by_user(error):
            error = UserError(f"the directory of the run cannot be made ({error}): choose another output= or run_dir=")
        if os.environ[SHOW_TRACEBACK] == "1" or not _caused_by_user(error):
            raise
        _failures.append(error)
    who = f"error on rank {rank()}" if rank() else "error"
    for failure in _failures:
        print(f"{who}: {explain(failure, config)}", file=sys.stderr, flush=True)
    if _failures and ranks_differ():
        os._exit(2)  # the way out in order would wait for ranks that may be gone
    sys.exit(2 if _failures else 0)
