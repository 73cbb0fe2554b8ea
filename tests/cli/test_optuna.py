"""Search for options with Optuna: search space, failures, a real search over eval/fid."""

import re

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from relay_diffusion.cli.main import JobError
from relay_diffusion.errors import UserError
from support import TINY, pythonpath, run, start

optuna = pytest.importorskip("optuna")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

from hydra_plugins.relay_optuna import OptunaSweeper, distribution  # noqa: E402

LR = "stage.optimizer.lr"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("interval(0,1)", FloatDistribution(0, 1)),
        ("int(interval(2,5))", IntDistribution(2, 5)),
        ("range(2,9,3)", IntDistribution(2, 8, step=3)),
        ("a,b", CategoricalDistribution(["a", "b"])),
        ("choice(1,2.5,[3,4])", CategoricalDistribution(["1", "2.5", "[3,4]"])),
    ],
)
def test_values_of_hydra_are_a_search_space(word, expected):
    (override,) = OverridesParser.create().parse_overrides([f"key={word}"])
    assert distribution(override) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tag(log,interval(0,1e-2))", "a log scale needs numbers above 0; raise the first number"),
        ("interval(1e-2,1e-4)", "the first number must be below the second one"),
        ("interval(0,inf)", "the first number must be below the second one, and both finite"),
        ("range(5,2)", "has no numbers; write range"),
        ("range(1,5,0)", "has no numbers; write range"),
        ("tag(lgo,interval(1,2))", "the tag lgo has no effect here; the only one is tag(log,interval(LOW,HIGH))"),
        ("tag(log,range(1,5))", "the tag log has no effect here"),
        ("tag(log,choice(1,2))", "the tag log has no effect here"),
    ],
)
def test_a_wrong_search_space_is_refused(word, message):
    (override,) = OverridesParser.create().parse_overrides([f"{LR}={word}"])
    with pytest.raises(UserError, match="^" + re.escape(f"{LR}={word}: {message}")):
        distribution(override)


class Launcher:
    """Runs `task` for each job, as a launcher of Hydra does."""

    def __init__(self, task):
        self.task, self.numbers = task, []

    def launch(self, batch, initial_job_idx):
        self.numbers += range(initial_job_idx, initial_job_idx + len(batch))
        for words in batch:
            place = {"hydra": {"runtime": {"output_dir": f"multirun/{words[-1]}"}}}
            job = JobReturn(hydra_cfg=OmegaConf.create(place))
            try:
                job.return_value, job.status = self.task(dict(word.split("=") for word in words)), JobStatus.COMPLETED
            except JobError as error:
                job.return_value, job.status = error, JobStatus.FAILED
            yield job


class ConfigLoader:
    """Composes jobs of their overrides alone."""

    def load_sweep_config(self, master_config, sweep_overrides):  # noqa: ARG002
        return OmegaConf.from_dotlist(sweep_overrides)


@pytest.fixture
def search(tmp_path):
    """Search for the best value of a function of the overrides, without training."""

    def run_search(task, *words, **options):
        sweeper = OptunaSweeper(**options)
        sweeper.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
        sweeper.hydra_context = type("Context", (), {"config_loader": ConfigLoader()})
        sweeper.launcher = Launcher(task)
        sweeper.sweep(list(words))
        return sweeper.launcher.numbers, best_of(tmp_path)

    return run_search


def best_of(folder):
    return yaml.safe_load((folder / "sweep/best.yaml").read_text())


SPACE = ("stage.seed=3", "a=interval(-4.0,4.0)", "b=1,2")


def quadratic(words):
    assert words["stage.seed"] == "3"
    return (float(words["a"]) - 1) ** 2 + int(words["b"])


@pytest.mark.parametrize(("direction", "best"), [("minimize", min), ("maximize", max)])
def test_the_best_options_are_found(search, direction, best):
    values = []

    def task(words):
        values.append(quadratic(words))
        return values[-1]

    numbers, found = search(task, *SPACE, trials=12, parallel=4, direction=direction)
    assert numbers == list(range(12))
    assert len({*values}) == 12
    assert found["value"] == best(values)
    words = dict(word.split("=") for word in found["overrides"])
    assert quadratic(words) == found["value"]
    assert found["run_dir"] == f"multirun/{found['overrides'][-1]}"


def test_failed_trials_are_left_out(search, capsys):
    def sometimes(words):
        if words["b"] == "2":
            raise JobError("job 7: training has diverged", 2)
        return float("nan") if float(words["a"]) > 2 else quadratic(words)

    numbers, found = search(sometimes, *SPACE, trials=8, max_failures=20)
    assert len(numbers) > 8
    assert "b=1" in found["overrides"]
    assert "failed: job 7: training has diverged" in capsys.readouterr().out


def test_only_failures_stop_the_search(search):
    def never(_):
        raise JobError("job 0: wrong", 2)

    with pytest.raises(UserError, match=r"^hydra\.sweeper: the last 2 trials failed; see their errors"):
        search(never, *SPACE, trials=8, max_failures=2)


def test_a_bug_stops_the_search(search, tmp_path):
    values = []

    def broken(words):
        if len(values) == 5:
            raise JobError("job 5: ZeroDivisionError", 1)
        values.append(quadratic(words))
        return values[-1]

    with pytest.raises(JobError, match="ZeroDivisionError"):
        search(broken, *SPACE, trials=8, parallel=2)
    assert best_of(tmp_path)["value"] == min(values)  # with the value of the other job of the batch


def test_an_interrupted_search_leaves_its_best_options(search, tmp_path):
    values = []

    def interrupted(words):
        if len(values) == 3:
            raise KeyboardInterrupt
        values.append(quadratic(words))
        return values[-1]

    with pytest.raises(KeyboardInterrupt):
        search(interrupted, *SPACE, trials=8)
    assert best_of(tmp_path)["value"] == min(values)


KILLED = """
import os, signal
from hydra.core.hydra_config import HydraConfig
from relay_diffusion.cli.main import TRAIN, command_line

def task(cfg):
    if HydraConfig.get().job.num == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(cfg.seed)

command_line(task, TRAIN)
"""


@pytest.mark.slow  # submitit waits for the result of a killed job
def test_a_killed_job_of_submitit_is_a_failed_batch(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "killed.py").write_text(KILLED)
    result = start(
        str(tmp_path / "killed.py"), "--multirun", "hydra/sweeper=optuna", "hydra/launcher=submitit_local",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", "seed=range(1,9)", "hydra.sweeper.trials=2",
        "hydra.sweeper.parallel=2", PYTHONPATH=pythonpath(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("trials 0, 1 failed: a job of the sweep was killed or ran out of memory: Job ")
    values = [int(line.rpartition("seed=")[2]) for line in lines if line.startswith(("trial 2: ", "trial 3: "))]
    assert len(values) == 2
    assert best_of(tmp_path)["value"] == min(values)


@pytest.mark.slow
def test_a_stored_study_is_continued(search, tmp_path):
    stored = {"study": "mine", "storage": f"sqlite:///{tmp_path / 'study.db'}"}
    first, _ = search(quadratic, *SPACE, trials=2, **stored)
    second, found = search(quadratic, *SPACE, trials=5, **stored)
    assert (first, second) == ([0, 1], [2, 3, 4])
    trials = optuna.load_study(study_name="mine", storage=stored["storage"]).trials
    assert len({trial.params["a"] for trial in trials}) == 5  # other values, not the first ones again
    assert found["value"] == min(trial.value for trial in trials)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, r"^hydra\.sweeper\.trials=0: must be a whole number, at least 1"),
        ({"trials": "abc"}, r"^hydra\.sweeper\.trials=abc: must be a whole number, at least 1"),
        ({"trials": True}, r"^hydra\.sweeper\.trials=True: must be a whole number, at least 1"),
        ({"trials": 1, "seed": "abc"}, r"^hydra\.sweeper\.seed=abc: must be a whole number, at least 0"),
        ({"trials": 1, "seed": -1}, r"^hydra\.sweeper\.seed=-1: must be a whole number, at least 0"),
        ({"trials": 1, "direction": "down"}, r"^hydra\.sweeper\.direction=down: use minimize or maximize"),
        ({"trials": 1, "study": "mine", "storage": 5}, r"^hydra\.sweeper\.storage=5: must be the URL of a database"),
        ({"trials": 1, "study": "mine"}, r"^hydra\.sweeper\.study and storage: give both"),
    ],
)
def test_errors_name_options_of_the_search(search, options, message):
    with pytest.raises(UserError, match=message):
        search(quadratic, *SPACE, **options)


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ("foo", "Could not parse"),
        ("sqlite:////missing_folder/study.db", "unable to open database file"),
        ("redis://host", "RedisStorage is removed"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_refused(search, storage, reason):
    message = (
        rf"^hydra\.sweeper\.storage={storage}: {reason}.*; use the URL of a database in a folder that can be written"
    )
    with pytest.raises(UserError, match=message):
        search(quadratic, *SPACE, trials=1, study="mine", storage=storage)


@pytest.fixture
def stored(tmp_path):
    """Options of a stored study without trials."""
    options = {"study": "mine", "storage": f"sqlite:///{tmp_path / 'study.db'}"}
    optuna.create_study(study_name="mine", storage=options["storage"])
    return options


def test_a_read_only_storage_is_refused(search, tmp_path, stored):
    url = f"sqlite:///file:{tmp_path / 'study.db'}?mode=ro&uri=true"
    with pytest.raises(UserError, match=r"^hydra\.sweeper\.storage=.*readonly database; use the URL"):
        search(quadratic, *SPACE, trials=1, **stored | {"storage": url})


@pytest.mark.parametrize("changed", ["b=1,2,3", "b=range(1,3)"])
def test_a_stored_study_with_other_choices_is_refused(search, stored, changed):
    search(quadratic, *SPACE, trials=1, **stored)
    with pytest.raises(UserError, match=r"^hydra\.sweeper\.study=mine: its earlier trials chose b from other values"):
        search(quadratic, *SPACE[:2], changed, trials=2, **stored)
    assert len(optuna.load_study(study_name="mine", storage=stored["storage"]).trials) == 1


def test_a_stored_study_with_another_direction_is_refused(search, stored):
    message = r"^hydra\.sweeper\.direction=maximize: hydra\.sweeper\.study=mine was started with minimize; use that"
    with pytest.raises(UserError, match=message):
        search(quadratic, *SPACE, trials=1, direction="maximize", **stored)


def test_a_search_needs_something_to_search(search):
    with pytest.raises(UserError, match="no option has several values; give some"):
        search(quadratic, "stage.seed=3", trials=2)


def test_a_job_without_a_value_is_an_error(search, tmp_path):
    values = [True, False]
    with pytest.raises(UserError, match=r"trial 0 returned no value: .*set optimized_metric.*; .*add mode=evaluate"):
        search(lambda words: 5 if values.pop() else None, *SPACE, trials=2, parallel=2)  # noqa: ARG005
    assert best_of(tmp_path)["value"] == 5  # of the other job of the batch


def test_sampling_without_metrics_is_an_error_before_the_jobs(search):
    with pytest.raises(UserError, match=r"^mode=sample: returns no value to optimize; add mode=evaluate$"):
        search(None, "mode=sample", "a=1,2", trials=2)


@pytest.mark.parametrize(("direction", "mode"), [("minimize", "max"), ("maximize", "min")])
def test_the_direction_is_that_of_the_best_checkpoint(search, direction, mode):
    options = ("callbacks.checkpoints.best=M", f"callbacks.checkpoints.best_mode={mode}", "a=1,2")
    other = {"minimize": "maximize", "maximize": "minimize"}[direction]
    message = (
        rf"^hydra\.sweeper\.direction={direction}: .*best_mode={mode}; use direction={other}, or set optimized_metric"
    )
    with pytest.raises(UserError, match=message):
        search(None, *options, trials=1, direction=direction)

    def value(words):
        return int(words["a"])

    assert search(value, *options, trials=1, direction=other)[0] == [0]
    assert search(value, *options, "optimized_metric=N", trials=1, direction=direction)[0] == [0]


@pytest.mark.slow
def test_a_search_over_fid(small_zip, tmp_path):
    """Three trainings, whose metric is eval/fid of pixels."""
    result = run(
        "train.py", "--multirun", "hydra/sweeper=optuna", "hydra.sweeper.trials=3", "optimized_metric=eval/fid", *TINY,
        "~callbacks.progress",
        "network.channel_mult=[1]", "resolution=16", f"data.dataset.path={small_zip}", "trainer.max_images=8",
        "callbacks=evaluated", "callbacks.evaluation.count=8", f"{LR}=tag(log,interval(1e-4,1e-2))",
        f"callbacks.evaluation.evaluator.reference.cache={tmp_path / 'reference'}",
        "callbacks.evaluation.evaluator.inception._target_=pixel_inception.pixels_in_a_process_of_their_own",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", PYTHONPATH=pythonpath("tests"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    best = yaml.safe_load((tmp_path / "sweep/best.yaml").read_text())
    rows = sorted((tmp_path / "sweep").glob("*/log/metrics.csv"))
    last = [dict(zip(*(line.split(",") for line in file.read_text().splitlines()), strict=True)) for file in rows]
    assert tmp_path / "sweep" / best["run_dir"].rpartition("/")[2] in [file.parents[1] for file in rows]
    assert len(last) == 3
    assert best["value"] == pytest.approx(min(float(row["eval/fid"]) for row in last))
    (rate,) = [word.partition("=")[2] for word in best["overrides"] if word.startswith(LR)]
    assert 1e-4 <= float(rate) <= 1e-2
    assert result.stdout.splitlines()[-1].startswith(f"best of 3 trials: {best['value']:.6g} with ")


@pytest.mark.parametrize(("metric", "meant"), [("eval/fid", "; logged are train/loss"), ("train/los", "train/loss?")])
def test_a_metric_that_nothing_logs_is_an_error(fit, metric, meant):
    with pytest.raises(UserError, match=rf"^optimized_metric={metric}: no callback logs it.*{meant}"):
        fit("run", 8, f"optimized_metric={metric}")
