"""Sweeps: all jobs are checked before the first one starts, and none shares another's directory."""

import pytest
from hydra.errors import HydraException

from relay_diffusion.config import CONF, validate_sampling, validate_training
from relay_diffusion.errors import UserError
from relay_diffusion.overrides import arranged, parse
from relay_diffusion.sweep import check_sweep
from support import TINY, run


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
