"""Command lines: mistakes end as one clear line and exit code 2, never as a traceback."""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relay_diffusion.cli.overrides import arranged, check_added, not_an_option, parse, unreadable, versions
from relay_diffusion.cli.sweep import JobError, check_sweep
from relay_diffusion.config import CONF
from relay_diffusion.config.run_dir import register_resolvers, sweep_job
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.distributed import first_failure, leave_group, rank, ranks_differ
from relay_diffusion.utils.files import write_text

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
        return f"{not_an_option(name, config)}{nearest(name, _known_keys(config, name))}"
    found = re.search(r"Could not find '([^']+)'", message)
    if found:
        group, _, name = found[1].rpartition("/")
        listed = message.partition("Available options in")[2]
        choices = [line.strip() for line in listed.splitlines()[1:] if line.strip() and " " not in line.strip()]
        options = f"; it can be {', '.join(choices)}" if choices else ""
        if group == "hydra/launcher" and name.startswith("submitit"):
            options = "; pip install -e '.[slurm]' brings it"
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


def _shows_traceback() -> bool:
    return os.environ.get(SHOW_TRACEBACK) == "1"


@contextmanager
def report_errors(config: Path) -> Iterator[None]:
    """Report errors inside a Hydra main function, before Hydra does.

    A mistake of the user is one line and exit code 2; anything else keeps its traceback and exit code 1. In a job of a
    sweep both become a JobError, and the other jobs go on. config: the yaml that the function composes.
    """
    job = sweep_job()
    try:
        if job is not None and rank() == 0:
            print(f"job {job.job.num}: {' '.join(job.overrides.task)}", flush=True)
        if job is None:
            _check_no_launcher()
        yield
    except Exception as error:
        expected = _caused_by_user(error) and not _shows_traceback()
        first, code = first_failure(2 if expected else 1)
        if first != rank() and not expected and not _shows_traceback():
            error = UserError(f"rank {first} has failed, and says why")  # here only the connection broke
            expected = True
        if expected and rank() > 0 and not ranks_differ():
            time.sleep(FIRST_RANK_SECONDS)  # the first rank says the same, before a launcher ends all for this one
            raise SystemExit(code) from None
        if job is not None:
            text = explain(error, config) if expected else f"\n{traceback.format_exc()}"
            failure = JobError(f"job {job.job.num} ({job.job.override_dirname})", text, code)
            failure.show()  # at once, and in the output of the job
            raise failure from None
        if not expected:
            raise
        _print_error(error, config)
        if ranks_differ():
            os._exit(code)  # the way out in order would wait for ranks that may be gone
        raise SystemExit(code) from None
    finally:
        if job is not None:
            _remove_if_empty(Path(job.runtime.output_dir))  # Hydra's, where run_dir= names another one


def _check_no_launcher() -> None:
    launcher = HydraConfig.get().runtime.choices.get("hydra/launcher", "basic")
    require(
        launcher == "basic",
        f"hydra/launcher={launcher} starts the jobs of a sweep: add --multirun, or leave the launcher out",
    )


def _print_error(error: Exception, config: Path) -> None:
    who = f"error on rank {rank()}" if rank() else "error"
    print(f"{who}: {explain(error, config)}", file=sys.stderr, flush=True)


@contextmanager
def run_directory(path: str) -> Iterator[None]:
    """Create the directory of a run; remove what stays empty of it, because the run failed early.

    A job of a sweep stores its overrides there. Raises UserError if the directory cannot be created.
    """
    directory = Path(path)
    try:
        created = [place for place in (directory, *directory.parents) if not place.exists()]
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the directory of the run cannot be made ({error}): choose another output= or run_dir="
        ) from None
    job = sweep_job()
    if job is not None and rank() == 0:
        write_text(directory / "overrides.yaml", OmegaConf.to_yaml(job.overrides.task))
    try:
        yield
    finally:
        for place in created:
            _remove_if_empty(place)


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):  # another rank may be quicker; a directory with files stays
        directory.rmdir()


def command_line(task: Callable[[DictConfig], None], config: Path, validate: Callable[[DictConfig], None]) -> NoReturn:
    """Run `task` with the settings that Hydra composes from the yaml `config` and the command line.

    The user's mistakes become one line on standard error and exit code 2; `validate` checks the settings, here those of
    the jobs of a sweep. With HYDRA_FULL_ERROR=1 every error keeps its traceback. Without arguments it prints the help.
    """
    sys.argv[1:] = arranged(sys.argv[1:] or ["--help"])
    if "--version" in sys.argv:
        print(versions())
        sys.exit(0)
    os.environ.setdefault(SHOW_TRACEBACK, os.environ.get(FULL_ERROR, "0"))  # processes that this one starts inherit it
    os.environ[FULL_ERROR] = "1"  # let errors through to here
    try:
        arguments = parse(sys.argv[1:])
        if arguments.config_name is None:
            check_added(arguments.overrides, config)
        check_sweep(arguments, config, validate)
        hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)(task)()
        sys.stdout.flush()
        leave_group()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # threads and other processes may wait for this one
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains on its way out
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if _shows_traceback() or not _caused_by_user(error):
            raise
        _print_error(error, config)
        sys.exit(2)
    sys.exit(0)


TRAIN, SAMPLE = CONF / "train.yaml", CONF / "sample.yaml"


def _train(cfg: DictConfig) -> None:
    with report_errors(TRAIN):
        validate_training(cfg)
        with run_directory(cfg.run_dir):
            from relay_diffusion.training.run import train  # torch and lightning: only once the settings are sound
            from relay_diffusion.training.trainer import check_gpus

            check_gpus(cfg.trainer)
            train(cfg)


def _sample(cfg: DictConfig) -> None:
    with report_errors(SAMPLE):
        validate_sampling(cfg)
        with run_directory(cfg.output):
            from relay_diffusion.sampling.run import sample
            from relay_diffusion.training.trainer import check_gpus

            check_gpus(cfg.trainer)
            sample(cfg)


def train() -> NoReturn:
    """Compose, validate, build, fit."""
    register_resolvers()
    command_line(_train, TRAIN, validate_training)


def sample() -> NoReturn:
    """Compose, validate, build, predict or evaluate."""
    register_resolvers()
    command_line(_sample, SAMPLE, validate_sampling)
