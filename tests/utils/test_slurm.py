"""Requeueing of SLURM jobs."""

import subprocess

import pytest

from relay_diffusion.utils import slurm


def test_a_timeout_of_the_queue_is_reported(monkeypatch, capsys):
    def never(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(slurm.subprocess, "run", never)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)
    slurm.requeue()
    assert "job 7 could not be requeued" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "called"),
    [
        ({"SLURM_JOB_ID": "7"}, ["scontrol", "requeue", "7"]),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, ["scontrol", "requeue", "7_2"]),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash"}, None),
        ({}, None),
    ],
)
def test_only_a_batch_job_is_requeued(monkeypatch, environment, called):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **_: calls.append(command))
    slurm.requeue()
    assert calls == ([called] if called else [])


def test_a_job_that_cannot_be_requeued_is_reported(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "")
    slurm.requeue()
    assert "job 7 could not be requeued" in capsys.readouterr().out
