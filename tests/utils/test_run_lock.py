"""Exclusive lock of a run directory, also after a process was killed."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from processes import Process, ended, until
from relay_diffusion.errors import UserError
from relay_diffusion.utils import run_lock as locks
from relay_diffusion.utils.run_lock import LOCK, Holder, run_lock
from support import PROJECT, TINY, run


@pytest.fixture
def left(tmp_path):
    """Write the lock file of another process; the arguments are its differences from this process."""

    def leave(**differences):
        content = {**vars(Holder.this_process()), **differences}
        (tmp_path / LOCK).write_text(json.dumps(content))
        return content

    return leave


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def kernel_locks(request, monkeypatch):
    """File systems with and without locks."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if not request.param:
        monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    return request.param


def test_the_lock_is_removed(tmp_path):
    with run_lock(tmp_path / "run", "run_dir"):
        assert Holder.parse((tmp_path / "run" / LOCK).read_text()) == Holder.this_process()
    assert not (tmp_path / "run").exists()  # nothing was written to it
    with run_lock(tmp_path / "a/b/run", "run_dir"):
        (tmp_path / "a/kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError, match="something"), run_lock(tmp_path / "run", "run_dir"):
        raise RuntimeError("something")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_run_of_this_process_is_refused(tmp_path, kernel_locks):  # noqa: ARG001
    expected = rf"^output={tmp_path}: in use by process {os.getpid()} on host {socket.gethostname()}; wait until"
    with run_lock(tmp_path, "output"):
        for _ in range(2):
            with pytest.raises(UserError, match=expected), run_lock(tmp_path, "output"):
                pass
        assert (tmp_path / LOCK).exists()
    with run_lock(tmp_path, "output"):
        pass


FORKING = """
import os, sys, time
from relay_diffusion.utils.run_lock import run_lock
with run_lock(sys.argv[1], "run_dir"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_it_is_killed(tmp_path):
    """Data workers, which inherit open files, may outlive the process."""
    command = [sys.executable, "-c", FORKING, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(UserError, match=f"in use by process {process.pid} on host"), run_lock(tmp_path, "o"):
                pass
            process.kill()
            process.wait()
            with run_lock(tmp_path, "run_dir"):
                assert Holder.parse((tmp_path / LOCK).read_text()).pid == os.getpid()
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    "differences",
    [
        {"started": "1"},  # this pid, used again
        {"pid": 2**22 + 1},  # no such process
        {"boot": "of another kernel"},  # the host was started again
    ],
)
def test_stale_locks_are_taken_over(tmp_path, left, kernel_locks, differences):  # noqa: ARG001
    left(**differences)
    with run_lock(tmp_path, "run_dir"):
        assert Holder.parse((tmp_path / LOCK).read_text()) == Holder.this_process()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host": 1}', "\0\xff"])
def test_a_lock_file_without_a_holder_is_free(tmp_path, content):
    """A process was killed while writing it."""
    (tmp_path / LOCK).write_text(content)
    with run_lock(tmp_path, "run_dir"):
        pass


def test_a_lock_of_another_host_is_kept(tmp_path, left):
    left(host="node7", boot="of another kernel", pid=123)
    expected = (
        rf"locked by process 123 on host node7, which host \S+ cannot check; if it no .*, delete {tmp_path / LOCK}$"
    )
    with pytest.raises(UserError, match=expected), run_lock(tmp_path, "run_dir"):
        pass
    (tmp_path / LOCK).unlink()
    with run_lock(tmp_path, "run_dir"):
        pass


def test_a_requeued_job_takes_over_its_own_lock_on_another_host(tmp_path, left, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    left(host="node7", boot="of another kernel")
    with pytest.raises(UserError, match="node7"), run_lock(tmp_path, "run_dir"):
        pass  # another step of this job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with run_lock(tmp_path, "run_dir"):
        pass


def test_a_container_of_this_host_is_stale_only_with_kernel_locks(tmp_path, left, kernel_locks):
    left(host="0123456789ab", namespace="pid:[1]")
    if kernel_locks:
        with run_lock(tmp_path, "run_dir"):
            pass
    else:
        with pytest.raises(UserError, match="on host 0123456789ab"), run_lock(tmp_path, "run_dir"):
            pass


def test_a_directory_that_cannot_be_locked_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    expected = pytest.raises(UserError, match=r"^o=\S+file/run: cannot be created or locked")
    with expected, run_lock(tmp_path / "file/run", "o"):
        pass


@contextmanager
def paused(process):
    """Let a process and its ranks wait: it holds its lock, and leaves the CPU to others."""
    process.kill(signal.SIGSTOP)
    try:
        yield
    finally:
        process.kill(signal.SIGCONT)


def refused(result, option, directory, process):
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.strip().splitlines()
    host = socket.gethostname()
    assert line.startswith(f"error: {option}={directory}: in use by process {process.popen.pid} on host {host}; wait")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [[], ["strategy=ddp_cpu"]], ids=["one process", "two ranks"])
def test_a_second_training_process_is_refused_until_the_first_is_killed(tmp_path, small_zip, strategy):
    directory = tmp_path / "run"
    command = [PROJECT / "train.py", *TINY, "resolution=16", f"data.dataset.path={small_zip}", f"run_dir={directory}"]
    command += ["callbacks.checkpoints.every_n_images=40", *strategy]
    with ended([Process(tmp_path / "first.txt", [*command, "trainer.max_images=1000000"])]) as (first,):
        until(lambda: (directory / "checkpoints/last.ckpt").exists(), [first])
        with paused(first):
            refused(run(*map(str, command)), "run_dir", directory, first)
        assert first.popen.poll() is None
        first.kill(signal.SIGKILL)
        first.wait()
    assert (directory / LOCK).exists()
    with ended([Process(tmp_path / "second.txt", [*command, "trainer.max_images=1000000"])]) as (second,):
        until(lambda: "training: " in second.text(), [second])
        second.popen.terminate()
        assert second.wait() == 128 + signal.SIGTERM, second.text()
    assert not (directory / LOCK).exists()


@pytest.mark.slow
def test_sampling_and_evaluation_lock_their_output(tmp_path, relay_overrides):
    output = tmp_path / "samples"
    slow = ["relay.stages.base.changes.sampler.steps=100", "batch_size=1", "picture=0", "seeds=0-999"]
    command = [PROJECT / "sample.py", *relay_overrides, *slow]
    with ended([Process(tmp_path / "first.txt", command)]) as (first,):
        until(lambda: list(output.rglob("seed*.png")), [first])
        with paused(first):
            for mode in ("sample", "evaluate"):
                refused(run(*map(str, command), f"mode={mode}"), "output", output, first)
        first.popen.terminate()
        assert first.wait() == 128 + signal.SIGTERM, first.text()
    assert "stopped by SIGTERM: the same command continues" in first.text()
    assert not (output / LOCK).exists()
