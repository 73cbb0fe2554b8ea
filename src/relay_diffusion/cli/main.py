"""Run train.py and sample.py: an error of the user is one line and exit code 2, never a traceback."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from relay_diffusion import __version__
from relay_diffusion.config import CONF
from relay_diffusion.config.run_dir import register_resolvers, sweep_job
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.distributed import destroy_process_group, first_failure, rank, ranks_differ
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.messages import did_you_mean

TRAIN, SAMPLE = CONF / "train.yaml", CONF / "sample.yaml"
PACKAGES = {"hydra": "hydra-core", "torch": "torch", "lightning": "lightning"}  # whose versions results depend on
FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch: set it to 1 to see tracebacks
SHOW_TRACEBACK = "RELAY_DIFFUSION_TRACEBACK"  # the user's setting of it
FIRST_RANK_SECONDS = 3
DIRECTORIES = ("output=", "run_dir=", "run_id=")  # what two jobs of a sweep cannot share
SLURM = {"hydra/launcher=slurm", "hydra/launcher=submitit_slurm"}


class JobError(Exception):
    """Failure of a job of a sweep, already reported by the job. Pickles: launchers return it from other processes."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)
        self.text, self.code = text, code


def explain(error: BaseException, config: Path) -> str:
    """Describe an error of the user in one line. config: the yaml of the command, for the nearest key."""
    causes = list(_causes(error))
    users = next((cause for cause in causes if isinstance(cause, UserError)), None)
    unknown = next((cause for cause in causes if isinstance(cause, ConfigKeyError | AttributeError)), None)
    resolved = next((cause for cause in causes if isinstance(cause, OmegaConfBaseException)), None)
    if users is not None:
        text = str(users).rpartition("UserError: ")[2]  # a data worker sends its traceback along
    elif isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = str(error).rpartition("full_key: ")[2]
        cause = str(error.__cause__)
        named = cause.partition("=")[0].isidentifier()  # a constructor names its argument
        text = f"{key}{'.' if named else ': '}{cause}"
    elif isinstance(error, OverrideParseException):
        text = (
            f"{error.override}: options are KEY=VALUE, as seeds=0-7; brackets must close, and a value with spaces or "
            f"special characters needs quotes inside: \"KEY='VALUE'\""
        )
    elif isinstance(error, MissingConfigException) and error.missing_cfg_file:
        text = _unknown_choice(error.missing_cfg_file, list(error.options or []))
    elif isinstance(unknown, OmegaConfBaseException) and unknown.full_key and isinstance(error, HydraException):
        name, known = str(unknown.full_key), _known_keys(config)
        elsewhere = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]  # the same last word
        nearest = f"; did you mean {elsewhere[0]}?" if elsewhere else did_you_mean(name, known, "")
        text = f"{name} is not an option{nearest}"
    elif resolved is not None and resolved.full_key:
        text = f"{resolved.full_key}: {str(resolved).splitlines()[0]}"
    elif type(error) is ConfigCompositionException:
        text = f"{error} (--help lists the groups and options)"
    else:
        text = str(error)
    return " ".join(text.split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_choice(choice: str, known: list[str]) -> str:
    group, _, name = choice.rpartition("/")
    if group == "hydra/launcher" and name.startswith("submitit"):
        return f"{group}={name}: the launcher is not installed; pip install -e '.[slurm]'"
    return f"unknown choice {group}={name}{did_you_mean(name, known)}"


def _known_keys(config: Path) -> list[str]:
    """Every key of a command's config, with the group choices of its defaults."""
    with initialize_config_dir(str(config.parent.resolve()), version_base="1.3"):
        return list(_keys(OmegaConf.to_container(compose(config.stem), resolve=False)))


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node if isinstance(node, dict) else ():
        if not str(key).startswith("_"):
            yield f"{prefix}{key}"
            yield from _keys(node[key], f"{prefix}{key}.")


def _caused_by_user(error: Exception) -> bool:
    return isinstance(error, UserError | HydraException | OmegaConfBaseException)  # among them: a class refused


def _shows_traceback() -> bool:
    return os.environ.get(SHOW_TRACEBACK) == "1"


def _check_command(config: Path) -> None:
    """Refuse what a config cannot know: a launcher without a sweep, and new keys that nothing reads."""
    settings = HydraConfig.get()
    launcher = settings.runtime.choices.get("hydra/launcher", "basic")
    require(
        launcher == "basic" or sweep_job() is not None,
        f"hydra/launcher={launcher} starts the jobs of a sweep: add --multirun, or leave the launcher out",
    )
    if settings.job.config_name != config.stem:
        return  # --config-name: another config has other keys
    main = OmegaConf.load(config)
    groups = sorted(str(group) for entry in main.defaults if isinstance(entry, DictConfig) for group in entry)
    groups = [group for group in groups if not group.startswith("override ")]
    words = [word.lstrip("+").partition("=")[0] for word in settings.overrides.task if word.startswith("+")]
    for word in words:
        key = word.partition(".")[0].partition("@")[0]
        require(
            key in main or key in groups,
            f"{key} is not an option of {config.stem}.py; its groups are {', '.join(groups)} (see --help)",
        )


@contextmanager
def report_errors(config: Path) -> Iterator[None]:
    """Report errors inside a Hydra main function, before Hydra does.

    An error of the user is one line and exit code 2; anything else keeps its traceback and exit code 1. In a job of a
    sweep both become a JobError, which stops the sweep. config: the yaml that the function composes.
    """
    job = sweep_job()
    try:
        if job is not None and rank() == 0:
            print(f"job {job.job.num}: {' '.join(job.overrides.task)}", flush=True)
        _check_command(config)
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
            if expected:
                _print_error(error, config)
            else:
                traceback.print_exc()
            text = explain(error, config) if expected else repr(error)
            raise JobError(f"job {job.job.num} ({job.job.override_dirname}): {text}", code) from None
        if not expected:
            raise
        _print_error(error, config)
        if ranks_differ():
            os._exit(code)  # the way out in order would wait for ranks that may be gone
        raise SystemExit(code) from None
    finally:
        if job is not None:
            _remove_if_empty(Path(job.runtime.output_dir))  # Hydra's, where run_dir= names another one


def _print_error(error: Exception, config: Path) -> None:
    who = f"error on rank {rank()}" if rank() else "error"
    print(f"{who}: {explain(error, config)}", file=sys.stderr, flush=True)


@contextmanager
def run_directory(path: str) -> Iterator[None]:
    """Create the run directory; remove what stays empty of it, because the run failed early.

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


def _check_sweep(words: list[str]) -> None:
    """Refuse a sweep that cannot work: jobs that share a directory, SLURM jobs on a host without SLURM."""
    if not {"-m", "--multirun"} & {*words}:
        return
    for word in words:
        own = "," in word or "${" in word
        require(
            own or not word.startswith(DIRECTORIES),
            f"{word}: jobs of the sweep would share it: leave it out, and each job gets its own",
        )
    require(
        not SLURM & {*words} or shutil.which("sbatch") is not None,
        "hydra/launcher: the jobs go to SLURM, but there is no sbatch on this host: start the sweep where SLURM is, or "
        "use hydra/launcher=submitit_local or basic",
    )


def versions() -> str:
    """Return one line: the version of this package and of those it depends on."""
    others = ", ".join(f"{name} {version(package)}" for name, package in PACKAGES.items())
    return f"relay-diffusion {__version__} ({others})"


def command_line(task: Callable[[DictConfig], float | None], config: Path) -> NoReturn:
    """Run `task` with the config that Hydra composes from the yaml `config` and the command line.

    The user's errors become one line on standard error and exit code 2. With HYDRA_FULL_ERROR=1 every error keeps its
    traceback. Without arguments it prints the help. `task` returns the metric for sweepers that optimize.
    """
    register_resolvers()
    sys.argv[1:] = sys.argv[1:] or ["--help"]
    if "--version" in sys.argv:
        print(versions())
        sys.exit(0)
    os.environ.setdefault(SHOW_TRACEBACK, os.environ.get(FULL_ERROR, "0"))  # processes that this one starts inherit it
    os.environ[FULL_ERROR] = "1"  # let errors through to here
    try:
        _check_sweep(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)(task)()
        sys.stdout.flush()
        destroy_process_group()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # threads and other processes may wait for this one
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains on its way out
        sys.exit(128 + signal.SIGPIPE)
    except JobError as failure:
        print(f"error: the sweep has stopped: {failure.text}", file=sys.stderr, flush=True)
        sys.exit(failure.code)
    except Exception as error:
        if type(error).__name__ == "UncompletedJobError":  # of submitit, which is optional
            reason = " ".join(str(error).splitlines()[:2])
            print(f"error: a job of the sweep was killed or ran out of memory: {reason}", file=sys.stderr, flush=True)
            sys.exit(2)
        if _shows_traceback() or not _caused_by_user(error):
            raise
        _print_error(error, config)
        sys.exit(2)
    sys.exit(0)


def run_training(cfg: DictConfig) -> float | None:
    """Validate, build, fit; return the last value of the metric that chooses best.ckpt, or else the training loss."""
    with report_errors(TRAIN):
        validate_training(cfg)
        with run_directory(cfg.run_dir):
            from relay_diffusion.training.run import train  # torch and lightning: only once the settings are sound
            from relay_diffusion.training.trainer import check_gpus

            check_gpus(cfg.trainer)
            stage = train(cfg)
            best = OmegaConf.select(cfg, "callbacks.checkpoints.best")
            metric = None if stage is None else stage.trainer.callback_metrics.get(best or "train/loss")
            return None if metric is None else float(metric)


def run_sampling(cfg: DictConfig) -> float | None:
    """Validate, build, sample; return the first metric of mode=evaluate."""
    with report_errors(SAMPLE):
        validate_sampling(cfg)
        with run_directory(cfg.output):
            from relay_diffusion.sampling.run import sample
            from relay_diffusion.training.trainer import check_gpus

            check_gpus(cfg.trainer)
            results = sample(cfg)
            return next((float(results[name]) for name in results.get("names", ())), None)


def train() -> NoReturn:
    """Train a stage: the command of train.py."""
    command_line(run_training, TRAIN)


def sample() -> NoReturn:
    """Sample and evaluate a relay: the command of sample.py."""
    command_line(run_sampling, SAMPLE)
