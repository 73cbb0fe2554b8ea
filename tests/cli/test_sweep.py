"""Sweeps: separate directories, stop at the first failure, returned metric."""

import csv
import pickle

import pytest
import yaml

from relay_diffusion.cli.main import JobError, _check_sweep
from relay_diffusion.errors import UserError
from support import TINY, pythonpath, run, start


@pytest.mark.parametrize("place", ["run_dir=x/mr", "run_id=mr", "output=x"])
def test_jobs_do_not_share_a_run(place):
    with pytest.raises(UserError, match=rf"^{place}: the jobs of the sweep would share it; remove it"):
        _check_sweep(["-m", place, "stage.optimizer.lr=1e-3,2e-3"])


@pytest.mark.parametrize("words", [["-m", "run_dir=x/${seed}"], ["--multirun", "run_dir=x/a,x/b"], ["run_dir=x/a"]])
def test_jobs_with_their_own_directories_are_accepted(words):
    _check_sweep([*words, "stage.optimizer.lr=1e-3"])


@pytest.fixture
def sweep(small_zip, tmp_path):
    """Run a sweep over data.dataset.path: a good zip, a truncated one, and the good one again."""
    corrupt = tmp_path / "corrupt.zip"
    corrupt.write_bytes(small_zip.read_bytes()[:3000])

    def start(*words, **environment):
        options = ["-m", *TINY, "resolution=16", "trainer.max_images=4", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
        return run("train.py", *options, f"data.dataset.path={small_zip},{corrupt}", *words, **environment)

    return start


def jobs(tmp_path):
    return sorted(path for path in (tmp_path / "sweep").iterdir() if path.name[0].isdigit())


@pytest.mark.slow
def test_a_job_that_fails_is_reported(sweep, tmp_path):
    result = sweep()
    assert result.returncode == 2, result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the sweep has stopped: job 1 (")
    assert "corrupt.zip" in last
    assert "Traceback" not in result.stderr
    (good,) = [job for job in jobs(tmp_path) if (job / "checkpoints/last.ckpt").exists()]
    overrides = yaml.safe_load((good / "overrides.yaml").read_text())
    assert "trainer.max_images=4" in overrides


def test_a_job_with_invalid_settings_stops_the_sweep(sweep, tmp_path):
    result = sweep("stage.optimizer.lr=-1")
    assert result.returncode == 2
    assert "error: stage.optimizer.lr=-1: " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: the sweep has stopped: job 0 (")
    assert jobs(tmp_path) == []


@pytest.mark.parametrize("word", ["stage.optimizer.lrr=1", "experiment=nothing"])
def test_an_unknown_option_starts_no_job(sweep, tmp_path, word):
    result = sweep(word)
    assert result.returncode == 2
    assert word.partition("=")[0] in result.stderr.splitlines()[-1]
    assert not (tmp_path / "sweep").exists() or jobs(tmp_path) == []


@pytest.mark.slow
def test_a_bug_in_a_job_keeps_its_traceback(sweep, tmp_path):
    (tmp_path / "broken.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Broken(Callback):\n"
        "    def on_train_start(self, trainer, module):\n"
        "        raise ZeroDivisionError('a bug')\n"
    )
    result = sweep("+callbacks.broken._target_=broken.Broken", PYTHONPATH=pythonpath(tmp_path))
    assert result.returncode == 1
    assert result.stderr.count("Traceback (most recent call last)") == 1
    assert "ZeroDivisionError: a bug" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the sweep has stopped: job 0 (")


def test_a_failure_returns_from_another_process():
    copy = pickle.loads(pickle.dumps(JobError("job 3: no such file", 2)))
    assert (copy.text, copy.code) == ("job 3: no such file", 2)


RECORDER = """
from hydra.plugins.sweeper import Sweeper
class Recorder(Sweeper):
    def __init__(self, **options):
        pass
    def setup(self, *, hydra_context, task_function, config):
        from hydra.core.plugins import Plugins
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config)
    def sweep(self, arguments):
        for first, jobs in (0, ("seed=3", "seed=4")), (2, ("stage.optimizer.lr=-1",)):
            for result in self.launcher.launch([[*arguments, job] for job in jobs], initial_job_idx=first):
                print("metric", result.return_value, flush=True)
"""


@pytest.mark.slow
def test_jobs_of_submitit(small_zip, tmp_path):
    """Two jobs return their metrics, as sweepers that optimize need; a third one fails."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins/recorder.py").write_text(RECORDER)
    result = start(  # Hydra looks for plugins once in a process
        "train.py", *TINY, "resolution=16", f"data.dataset.path={small_zip}", "trainer.max_images=8",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", "callbacks.log.every_n_images=4", "hydra/launcher=submitit_local",
        "hydra.sweeper._target_=hydra_plugins.recorder.Recorder", "-m", PYTHONPATH=pythonpath(tmp_path),
    )  # fmt: skip
    assert result.returncode == 2, result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the sweep has stopped: job 2 (")
    assert "stage.optimizer.lr=-1" in last
    assert "Traceback" not in result.stderr

    returned = [float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("metric ")]
    directories = sorted(jobs(tmp_path), key=lambda job: job.name.rpartition("-")[2])
    for job, seed, metric in zip(directories, (3, 4), returned, strict=True):
        assert f"seed={seed}" in yaml.safe_load((job / "overrides.yaml").read_text())
        assert (job / "checkpoints/last.ckpt").exists()
        with (job / "log/metrics.csv").open() as file:
            assert float(list(csv.DictReader(file))[-1]["train/loss"]) == pytest.approx(metric)
    assert returned[0] != returned[1]


@pytest.mark.parametrize("launcher", ["slurm", "submitit_slurm"])
def test_slurm_on_a_host_without_it(sweep, tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    result = sweep(f"hydra/launcher={launcher}", PATH="")
    assert result.returncode == 2
    assert result.stderr.startswith("error: hydra/launcher: needs SLURM, but this host has no sbatch; ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("choice", ["hydra/launcher=submitit_local", "hydra/sweeper=optuna"])
def test_a_launcher_or_sweeper_without_a_sweep_is_refused(tmp_path, choice):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    result = run("train.py", choice, f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert result.stderr == f"error: {choice} is for sweeps: add --multirun, or remove it\n"
    assert not (tmp_path / "run").exists()
