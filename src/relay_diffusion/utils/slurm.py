"""SLURM job of this process."""

from __future__ import annotations

import os
import subprocess

INTERACTIVE = ("bash", "interactive")  # job names of interactive shells


def is_interactive() -> bool:
    """Return whether this process runs in an interactive SLURM job.

    Such jobs come from `salloc` or `srun --pty bash`.
    """
    return os.environ.get("SLURM_JOB_NAME") in INTERACTIVE


def requeue() -> None:
    """Requeue the SLURM batch job, if there is one.

    The restarted job resumes its run, which is named after the job.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or is_interactive():
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
        print(f"requeued job {job}", flush=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"job {job} could not be requeued: {error}", flush=True)
