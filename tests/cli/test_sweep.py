"""Sweeps: all jobs are checked before the first one starts, and none shares another's directory."""

import pickle
import re

import pytest
import yaml
from hydra.errors import HydraException

from relay_diffusion.cli.overrides import arranged, parse
from relay_diffusion.cli.sweep import JobError, check_sweep
from relay_diffusion.config import CONF
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError
from support import TINY, pythonpath, run


@pytest.fixture
def check(small_zip):
    """Check a command line of train.py."""

    def make(*words):
        given = [*TINY, "resolution=16", f"data.dataset.path={small_zip}", *words]
        check_sweep(parse(arranged(given)), CONF / "train.yaml", validate_training)

    return make


@pytest.mark.parametrize("place", ["run_dir=x/mr", "run_id=mr", "run_dir=x/a,x/b"])
def test_jobs_do_not_share_a_run(check, place):
    key = place.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{key}=.*: jobs of the sweep would share it: leave {key} out"):
        check("-m", place, "stage.optimizer.lr=1e-3,2e-3")


def test_jobs_do_not_share_an_output():
    words = parse(["relay=emoji", "mode=sample,evaluate", "output=x", "-m"])
    with pytest.raises(UserError, match=r"^output=x: jobs of the sweep would share it"):
        check_sweep(words, CONF / "sample.yaml", validate_sampling)


@pytest.mark.parametrize(
    "words",
    [
        ["stage.optimizer.lr=1e-3,2e-3"],
        ["stage.optimizer.lr=1e-3,2e-3", "run_dir=x/${stage.optimizer.lr}"],
        ["run_dir=x/a,x/b"],
        ["run_dir=x/a"],  # of one job
    ],
)
def test_jobs_of_their_own_are_accepted(check, words):
    check("--multirun", *words)


def test_the_last_job_is_checked_too(check):
    with pytest.raises(UserError, match=r"^stage\.optimizer\.lr=fast: "):
        check("-m", "stage.optimizer.lr=1e-3,2e-3,fast")
    with pytest.raises(HydraException, match="experiment/nothing"):
        check("-m", "experiment=quickstart_base,nothing")


def test_what_is_no_sweep_is_left_to_the_run(check):
    check("stage.optimizer.lr=fast")


def test_a_sweep_that_cannot_work_starts_no_job(small_zip, tmp_path):
    options = [*TINY, "resolution=16", f"data.dataset.path={small_zip}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    result = run("train.py", *options, "-m", "stage.optimizer.lr=1e-3,fast", "trainer.max_images=4")
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: stage.optimizer.lr=fast: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def sweep(small_zip, tmp_path):
    """Run a sweep over data.dataset.path: a good zip, and one that is cut short, which shows when the job starts."""
    corrupt = tmp_path / "corrupt.zip"
    corrupt.write_bytes(small_zip.read_bytes()[:3000])

    def start(*words, **environment):
        options = [*TINY, "resolution=16", "trainer.max_images=4", f"hydra.sweep.dir={tmp_path / 'sweep'}", "-m"]
        return run("train.py", *options, f"data.dataset.path={corrupt},{small_zip}", *words, **environment)

    return start


@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_a_job_that_fails_is_reported_and_stops_no_other(sweep, tmp_path, launcher):
    if launcher == "submitit_local":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    result = sweep(f"hydra/launcher={launcher}")
    assert result.returncode == 2, result.stdout + result.stderr
    job = f"job 0 (data.dataset.path={tmp_path / 'corrupt.zip'})"
    error, summary = result.stderr.splitlines()
    assert error.startswith(f"error in {job}: ")
    assert "corrupt.zip" in error.removeprefix(f"error in {job}")
    assert summary == f"error: 1 of 2 jobs failed: {job}"
    jobs = [path for path in (tmp_path / "sweep").iterdir() if path.name[0].isdigit()]
    failed, good = sorted(jobs, key=lambda path: path.name.rpartition("-")[2])
    assert (good / "checkpoints/last.ckpt").exists()
    assert not (failed / "checkpoints").exists()
    for directory, archive in ((failed, "corrupt.zip"), (good, "small.zip")):
        overrides = yaml.safe_load((directory / "overrides.yaml").read_text())
        assert any(re.fullmatch(rf"data\.dataset\.path=.*{archive}", word) for word in overrides)
        assert "trainer.max_images=4" in overrides
    printed = result.stdout if launcher == "basic" else (tmp_path / "sweep").rglob("*_log.out")
    printed = printed if isinstance(printed, str) else "".join(path.read_text() for path in printed)
    for number in range(2):
        assert re.search(rf"^job {number}: network\.channels=8 .*data\.dataset\.path=", printed, re.MULTILINE)


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
    assert re.search(r"^error in job 1 \(data\.dataset\.path=\S+small\.zip\): $", result.stderr, re.MULTILINE)
    assert result.stderr.splitlines()[-1].startswith("error: 2 of 2 jobs failed: job 0 (")


def test_an_error_from_another_process_is_shown_here_once(capsys):
    error = JobError("job 3 (seed=2)", "no such file", 2)
    error.show()
    error.show()
    assert capsys.readouterr().err == "error in job 3 (seed=2): no such file\n"
    copy = pickle.loads(pickle.dumps(error))
    copy.show()
    assert (copy.job, copy.code) == ("job 3 (seed=2)", 2)
    assert capsys.readouterr().err == "error in job 3 (seed=2): no such file\n"


@pytest.mark.parametrize("launcher", ["slurm", "submitit_slurm"])
def test_slurm_on_a_host_without_it(sweep, tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    result = sweep(f"hydra/launcher={launcher}", PATH="")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: hydra/launcher: the jobs go to SLURM, but there is no sbatch on this host: "
    )
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_a_launcher_without_a_sweep_is_refused(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    result = run("train.py", "hydra/launcher=submitit_local", f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert result.stderr == (
        "error: hydra/launcher=submitit_local starts the jobs of a sweep: add --multirun, or leave the launcher out\n"
    )
    assert not (tmp_path / "run").exists()
