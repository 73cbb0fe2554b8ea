"""Optuna as a sweeper of Hydra: `train.py --multirun hydra/sweeper=optuna`.

The published plugin, hydra-optuna-sweeper 1.3, needs Optuna 2. Hydra imports all modules of hydra_plugins when it
starts, so this one imports Optuna only when a sweep starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.installed import require_library

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

MAX_SEED = 2**31  # NumPy takes 32 bits; a continued study adds the number of its trials


class OptunaSweeper(Sweeper):
    """Search for the options with the lowest or highest returned value.

    Overrides with several values, or an interval, are the search space. trials: jobs that return a value, those of an
    earlier part of the study included. parallel: jobs that the launcher gets at a time. direction: minimize or
    maximize. max_failures: failed jobs in a row that stop the sweep. study, storage: name and URL of a stored study,
    which a repeated command continues; None: not stored. Raises UserError for options out of range.
    """

    def __init__(
        self,
        trials: int,
        parallel: int = 1,
        direction: str = "minimize",
        seed: int = 0,
        max_failures: int = 3,
        study: str | None = None,
        storage: str | None = None,
    ) -> None:
        self.trials, self.parallel, self.seed = trials, parallel, seed
        self.direction: Any = direction
        self.max_failures, self.study, self.storage = max_failures, study, storage

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Build the launcher of the jobs."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials; write the best one of each batch and all before to best.yaml."""
        self._check()
        from optuna.trial import TrialState

        fixed, space = self._search_space(arguments)
        study = self._open_study(space)
        self._write_best(study)
        while (left := self.trials - len(_completed(study))) > 0:
            trials = [study.ask(space) for _ in range(min(left, self.parallel))]
            chosen = [[f"{key}={value}" for key, value in trial.params.items()] for trial in trials]
            self._run(study, trials, [[*fixed, *words] for words in chosen])
            last = study.trials[-self.max_failures :]
            if len(last) == self.max_failures and all(trial.state == TrialState.FAIL for trial in last):
                raise UserError(f"hydra.sweeper: the last {self.max_failures} trials failed; see their errors")
        best, place = study.best_trial, self._best_file()
        words = " ".join(best.user_attrs["overrides"])
        print(f"best of {self.trials} trials: {best.value:.6g} with {words}; see {place}")

    def _best_file(self) -> Path:
        assert self.config is not None
        return Path(self.config.hydra.sweep.dir) / "best.yaml"

    def _write_best(self, study: Study) -> None:
        """Write the best trial so far, if there is one, so that an interrupted search leaves it."""
        if not _completed(study):
            return
        best = study.best_trial
        content = {"value": best.value, **{key: best.user_attrs[key] for key in ("overrides", "run_dir")}}
        self._best_file().parent.mkdir(parents=True, exist_ok=True)
        write_text(self._best_file(), OmegaConf.to_yaml(OmegaConf.create(content)))

    def _check(self) -> None:
        require_library("hydra/sweeper=optuna", "optuna", "optuna")
        for option in ("trials", "parallel", "max_failures"):
            value = getattr(self, option)
            require(
                _is_whole(value) and value >= 1, f"hydra.sweeper.{option}={value}: must be a whole number, at least 1"
            )
        require(
            _is_whole(self.seed) and 0 <= self.seed < MAX_SEED,
            f"hydra.sweeper.seed={self.seed}: must be a whole number, at least 0 and below {MAX_SEED}",
        )
        known = ("minimize", "maximize")
        require(self.direction in known, f"hydra.sweeper.direction={self.direction}: use minimize or maximize")
        stored = (self.study is None) == (self.storage is None)
        require(stored, "hydra.sweeper.study and storage: give both, or none")
        require(
            self.storage is None or isinstance(self.storage, str),
            f"hydra.sweeper.storage={self.storage}: must be the URL of a database, e.g. sqlite:///study.db",
        )

    def _search_space(self, arguments: list[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
        """Return the overrides of all jobs, and the distributions of the others."""
        assert self.hydra_context is not None
        fixed: dict[str, str] = {}
        space: dict[str, BaseDistribution] = {}
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        for override in parser.parse_overrides(arguments):
            key = override.get_key_element()
            fixed.pop(key, None)
            space.pop(key, None)  # the last one counts
            if override.is_sweep_override():
                space[key] = distribution(override)
            else:
                fixed[key] = str(override.input_line)
        require(
            len(space) > 0,
            "hydra/sweeper=optuna: no option has several values; give some, e.g. "
            "'stage.optimizer.lr=tag(log,interval(1e-4,1e-2))'",
        )
        return list(fixed.values()), space

    def _open_study(self, space: Mapping[str, BaseDistribution]) -> Study:
        """Create or load the study; refuse a stored one with another direction or search space."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        name = None if self.study is None else str(self.study)
        try:
            study = optuna.create_study(
                storage=self.storage, study_name=name, direction=self.direction, load_if_exists=True
            )
            study.set_user_attr("seed", self.seed)  # fails here, before the jobs, if the database is read-only
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, RuntimeError, ValueError) as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise UserError(
                f"hydra.sweeper.storage={self.storage}: {reason}; use the URL of a database in a folder that can be "
                f"written, e.g. sqlite:///study.db"
            ) from None
        directions = [direction.name.lower() for direction in study.directions]
        require(
            directions == [self.direction],  # Optuna would ignore ours
            f"hydra.sweeper.direction={self.direction}: hydra.sweeper.study={name} was started with "
            f"{' and '.join(directions)}; use that direction, or another study",
        )
        for trial in study.get_trials(deepcopy=False):
            for key in trial.distributions.keys() & space.keys():
                try:
                    optuna.distributions.check_distribution_compatibility(trial.distributions[key], space[key])
                except ValueError:
                    raise UserError(
                        f"hydra.sweeper.study={name}: its earlier trials chose {key} from other values; restore them, "
                        f"or use another study"
                    ) from None
        # a continued study draws other values than its earlier part did
        seed = self.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.parallel > 1)
        return study

    def _check_jobs(self, overrides: Sequence[Sequence[str]]) -> None:
        """Compose the jobs; require that they return values, and in the direction of the search."""
        assert self.hydra_context is not None
        assert self.config is not None
        for words in overrides:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
            sampling = OmegaConf.select(cfg, "mode") == "sample"
            require(not sampling, "mode=sample: returns no value to optimize; add mode=evaluate")
            best = OmegaConf.select(cfg, "callbacks.checkpoints.best")
            if best is None or OmegaConf.select(cfg, "optimized_metric") is not None:
                continue  # otherwise the jobs return the metric of the best checkpoint
            mode = OmegaConf.select(cfg, "callbacks.checkpoints.best_mode")
            needed = {"min": "minimize", "max": "maximize"}.get(mode, self.direction)
            require(
                needed == self.direction,
                f"hydra.sweeper.direction={self.direction}: the jobs return {best}, with "
                f"callbacks.checkpoints.best_mode={mode}; use direction={needed}, or set optimized_metric",
            )

    def _run(self, study: Study, trials: Sequence[Trial], overrides: Sequence[Sequence[str]]) -> None:
        """Run a job for each trial; tell the study their values, then raise the first error that stops it."""
        from optuna.trial import TrialState

        from relay_diffusion.cli.main import lost_job, lost_job_text

        assert self.launcher is not None
        self._check_jobs(overrides)
        try:
            jobs = self.launcher.launch(overrides, initial_job_idx=trials[0].number)
        except Exception as error:
            if not lost_job(error):
                raise
            for trial in trials:  # submitit hands over no job of a batch with a killed one
                study.tell(trial, state=TrialState.FAIL)
            numbers = ", ".join(str(trial.number) for trial in trials)
            print(f"trials {numbers} failed: {lost_job_text(error)}", flush=True)
            return
        errors = [_record(study, *done) for done in zip(trials, overrides, jobs, strict=True)]
        self._write_best(study)
        for stopping in filter(None, errors):
            raise stopping


def _record(study: Study, trial: Trial, words: Sequence[str], job: JobReturn) -> Exception | None:
    """Tell the study the value of a job, or its failure.

    Returns an error that stops the search: no value, or a bug instead of options that fail.
    """
    from optuna.trial import TrialState

    from relay_diffusion.cli.main import JobError

    trial.set_user_attr("overrides", list(words))
    try:
        value = job.return_value
    except JobError as error:
        study.tell(trial, state=TrialState.FAIL)
        print(f"trial {trial.number} failed: {error.text}", flush=True)
        return error if error.code != 2 else None
    if value is None:
        study.tell(trial, state=TrialState.FAIL)
        hint = "for train.py set optimized_metric, e.g. to eval/fid; for sample.py add mode=evaluate and metrics"
        return UserError(f"trial {trial.number} returned no value: {hint}")
    assert job.hydra_cfg is not None  # the job returned a value
    trial.set_user_attr("run_dir", str(job.hydra_cfg.hydra.runtime.output_dir))
    if math.isfinite(value):
        study.tell(trial, value)
        print(f"trial {trial.number}: {value:.6g} with {_shown(trial.params)}", flush=True)
    else:
        study.tell(trial, state=TrialState.FAIL)
        print(f"trial {trial.number} failed: its value is {value}", flush=True)
    return None


def distribution(override: Override) -> BaseDistribution:
    """Return the distribution of an override with several values.

    interval(LOW,HIGH): numbers, on a log scale with tag(log,interval(...)), and whole with int(interval(...)).
    range(...): its numbers in order. Others: categories. Raises UserError for an interval or a range without numbers,
    and for other tags.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    word = override.input_line
    value: Any = override.value()
    for tag in sorted(value.tags - ({"log"} if isinstance(value, IntervalSweep) else set())):
        raise UserError(f"{word}: the tag {tag} has no effect here; the only one is tag(log,interval(LOW,HIGH))")
    if isinstance(value, IntervalSweep):
        low: Any = value.start  # not None in an override
        high: Any = value.end
        require(
            -math.inf < low < high < math.inf,
            f"{word}: the first number must be below the second one, and both finite; write interval(LOW,HIGH)",
        )
        require(
            low > 0 or "log" not in value.tags,
            f"{word}: a log scale needs numbers above 0; raise the first number, or remove tag(log,...)",
        )
        whole = isinstance(low, int) and isinstance(high, int)
        kind: Any = IntDistribution if whole else FloatDistribution
        return kind(low, high, log="log" in value.tags)
    if isinstance(value, RangeSweep):
        numbers = list(value.range()) if value.step else []
        require(len(numbers) > 0, f"{word}: has no numbers; write range(START,STOP,STEP), with STOP excluded")
        if all(isinstance(number, int) for number in numbers):
            return IntDistribution(min(numbers), max(numbers), step=abs(int(value.step)))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _completed(study: Study) -> list[Any]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def _shown(params: Mapping[str, Any]) -> str:
    values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in params.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())
