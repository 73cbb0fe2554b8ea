"""Commands train.py and sample.py.

A user error prints one line, with exit code 2.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from relay_diffusion import __version__
from relay_diffusion.cli.errors import caused_by_user, explain, groups_of, not_an_option
from relay_diffusion.config import CONF
from relay_diffusion.config.run_dir import register_resolvers, sweep_job
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.distributed import destroy_process_group, first_failure, rank, ranks_differ
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.garbage import without_garbage_collection
from relay_diffusion.utils.host import check_gpus

TRAIN, SAMPLE = CONF / "train.yaml", CONF / "sample.yaml"
PACKAGES = {"hydra": "hydra-core", "torch": "torch", "lightning": "lightning"}  # printed by --version
FULL_ERROR = "HYDRA_FULL_ERROR"  # variable of Hydra: 1 shows tracebacks
SHOW_TRACEBACK = "RELAY_DIFFUSION_TRACEBACK"  # the user's value of HYDRA_FULL_ERROR, which is overwritten below
FIRST_RANK_SECONDS = 3
DIRECTORIES = ("output=", "run_dir=", "run_id=")  # options that jobs of a sweep cannot share
SLURM = {"hydra/launcher=slurm", "hydra/launcher=submitit_slurm"}
FLAGS = {  # of Hydra
    *("--cfg", "--config-dir", "--config-name", "--config-path", "--experimental-rerun", "--help", "--hydra-help"),
    *("--info", "--multirun", "--package", "--resolve", "--run", "--shell-completion", "--version"),
}


class JobError(Exception):
    """Failure of a sweep job, already reported by the job.

    Can be pickled, because launchers return it from other processes.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)
        self.text, self.code = text, code


def lost_job(error: Exception) -> bool:
    """Whether submitit has no result of a job."""
    return type(error).__name__ == "UncompletedJobError"  # a class of submitit, which is optional


def lost_job_text(error: Exception) -> str:
    """Describe submitit's UncompletedJobError in one line."""
    return f"a job of the sweep was killed or ran out of memory: {' '.join(str(error).splitlines()[:2])}"


def _shows_traceback() -> bool:
    return os.environ.get(SHOW_TRACEBACK) == "1"


def _check_command(config: Path) -> None:
    """Reject a launcher or sweeper without a sweep, and unknown top-level keys.

    Raises UserError.
    """
    settings = HydraConfig.get()
    for group in ("hydra/launcher", "hydra/sweeper"):
        choice = settings.runtime.choices.get(group, "basic")
        require(
            choice == "basic" or sweep_job() is not None,
            f"{group}={choice} is for sweeps: add --multirun, or remove it",
        )
    if settings.job.config_name != config.stem:
        return  # --config-name chose a config with other keys
    main = OmegaConf.load(config)
    groups = groups_of(main)
    for word in settings.overrides.task:
        key = re.split("[.=@]", word.lstrip("+"))[0]
        if word.startswith("+") and key not in main and key not in groups:
            raise UserError(not_an_option(key, config))


@contextmanager
def report_errors(config: Path) -> Iterator[None]:
    """Report errors inside a Hydra main function, before Hydra does.

    A user error prints one line, with exit code 2; other errors keep their traceback, with exit code 1. In a sweep job
    both become a JobError, which stops the sweep. config: the yaml that the function composes.
    """
    job = sweep_job()
    try:
        if job is not None and rank() == 0:
            print(f"job {job.job.num}: {' '.join(job.overrides.task)}", flush=True)
        _check_command(config)
        yield
    except Exception as error:
        expected = caused_by_user(error) and not _shows_traceback()
        first, code = first_failure(2 if expected else 1)
        if first != rank() and not expected and not _shows_traceback():
            error = UserError(f"rank {first} failed: see its error message")  # this rank lost the connection to it
            expected = True
        if expected and rank() > 0 and not ranks_differ():
            time.sleep(FIRST_RANK_SECONDS)  # let rank 0 report the same error before a launcher terminates all ranks
            raise SystemExit(code) from None
        if job is not None:
            if expected:
                _print_error(error, config)
            else:
                traceback.print_exc()
            text = explain(error, config, sys.argv[1:]) if expected else repr(error)
            raise JobError(f"job {job.job.num} ({job.job.override_dirname}): {text}", code) from None
        if not expected:
            raise
        _print_error(error, config)
        if ranks_differ():
            os._exit(code)  # a normal exit would wait for ranks that may be gone
        raise SystemExit(code) from None
    finally:
        if job is not None:
            with suppress(OSError):  # another rank removed it, or it has files
                Path(job.runtime.output_dir).rmdir()  # Hydra's directory, which may differ from run_dir


def _print_error(error: Exception, config: Path) -> None:
    who = f"error on rank {rank()}" if rank() else "error"
    print(f"{who}: {explain(error, config, sys.argv[1:])}", file=sys.stderr, flush=True)


def _check_flags(words: list[str]) -> None:
    """Reject options written as flags, such as --seeds 0-7.

    Raises UserError.
    """
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not re.match(r"--\w", flag) or flag in FLAGS:
            continue
        following = "".join(words[number + 1 : number + 2])
        value = value if equals or not following or re.search(r"^-|=", following) else following
        written = f"{flag.lstrip('-')}={value or 'VALUE'}"
        raise UserError(f"{flag}: options are KEY=VALUE, without dashes; write {written} (--help lists the options)")


def _check_sweep(words: list[str]) -> None:
    """Reject sweep jobs that share a directory or need a missing SLURM.

    Raises UserError.
    """
    if not {"-m", "--multirun"} & {*words}:
        return
    for word in words:
        own = "," in word or "${" in word
        require(
            own or not word.startswith(DIRECTORIES),
            f"{word}: the jobs of the sweep would share it; remove it, and each job gets its own",
        )
    require(
        not SLURM & {*words} or shutil.which("sbatch") is not None,
        "hydra/launcher: needs SLURM, but this host has no sbatch; start the sweep on a SLURM host, or "
        "use hydra/launcher=submitit_local or basic",
    )


def command_line(task: Callable[[DictConfig], float | None], config: Path) -> NoReturn:
    """Run `task` with the composed config.

    Hydra composes it from the yaml `config` and the command line. User errors print one line on standard error, with
    exit code 2. With HYDRA_FULL_ERROR=1 every error keeps its
    traceback. Without arguments it prints the help. `task` returns the metric for sweepers that optimize.
    """
    register_resolvers()
    sys.argv[1:] = sys.argv[1:] or ["--help"]
    if "--version" in sys.argv:
        others = ", ".join(f"{name} {version(package)}" for name, package in PACKAGES.items())
        print(f"relay-diffusion {__version__} ({others})")
        sys.exit(0)
    os.environ.setdefault(SHOW_TRACEBACK, os.environ.get(FULL_ERROR, "0"))  # child processes inherit it
    os.environ[FULL_ERROR] = "1"  # Hydra must not handle errors
    try:
        _check_flags(sys.argv[1:])
        _check_sweep(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)(task)()
        sys.stdout.flush()
        destroy_process_group()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # a normal exit may wait for threads and other ranks
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
        sys.exit(128 + signal.SIGPIPE)
    except JobError as failure:
        print(f"error: the sweep has stopped: {failure.text}", file=sys.stderr, flush=True)
        sys.exit(failure.code)
    except Exception as error:
        if lost_job(error):
            print(f"error: {lost_job_text(error)}", file=sys.stderr, flush=True)
            sys.exit(2)
        if _shows_traceback() or not caused_by_user(error):
            raise
        _print_error(error, config)
        sys.exit(2)
    sys.exit(0)


def _begin(cfg: DictConfig, directory: str) -> None:
    """Check that the devices exist; record the overrides of a sweep job."""
    check_gpus(cfg.trainer)
    job = sweep_job()
    if job is not None and rank() == 0:
        write_text(Path(directory) / "overrides.yaml", OmegaConf.to_yaml(job.overrides.task))


def run_training(cfg: DictConfig) -> float | None:
    """Validate and train; return the last value of `optimized_metric`."""
    with report_errors(TRAIN):
        with without_garbage_collection():
            validate_training(cfg)
            _begin(cfg, cfg.run_dir)
            from relay_diffusion.training.run import train

        stage = train(cfg)
        best = OmegaConf.select(cfg, "callbacks.checkpoints.best")
        name = cfg.optimized_metric or best or "train/loss"
        metric = None if stage is None else stage.trainer.callback_metrics.get(name)
        require(
            metric is not None or cfg.optimized_metric is None or bool(cfg.trainer.get("fast_dev_run")),
            f"optimized_metric={name}: this start logged no value; use a new run_dir, or a period that it reaches",
        )
        return None if metric is None else float(metric)


def run_sampling(cfg: DictConfig) -> float | None:
    """Validate and sample; return the first metric of mode=evaluate."""
    with report_errors(SAMPLE):
        with without_garbage_collection():
            validate_sampling(cfg)
            _begin(cfg, cfg.output)
            from relay_diffusion.sampling.run import sample

        results = sample(cfg)
        return next((float(results[name]) for name in results.get("names", ())), None)


def train() -> NoReturn:
    """Train a stage: the command of train.py."""
    command_line(run_training, TRAIN)


def sample() -> NoReturn:
    """Sample and evaluate a relay: the command of sample.py."""
    command_line(run_sampling, SAMPLE)
