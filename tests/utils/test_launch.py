"""Launchers: number of processes, and sweeps on SLURM."""

import pytest
from omegaconf import OmegaConf

from relay_diffusion.errors import UserError
from relay_diffusion.utils.distributed import check_processes
from support import run


@pytest.mark.parametrize(
    ("environment", "world", "message"),
    [
        ({"SLURM_NTASKS": "4"}, 2, "are 2 processes, but SLURM started 4"),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, 2, None),  # started by hand within a job
        ({"SLURM_NTASKS": "4"}, 4, None),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, 1, "are 1 processes, but torchrun started 2"),
        ({"WORLD_SIZE": "2"}, 1, None),  # Lightning sets it for the processes that it starts
        ({}, 8, None),
    ],
)
def test_a_launcher_with_another_number_of_processes_is_refused(monkeypatch, environment, world, message):
    for name in ("SLURM_NTASKS", "SLURM_JOB_NAME", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message is None:
        check_processes(world)
    else:
        with pytest.raises(UserError, match=message):
            check_processes(world)


def test_sweeps_on_slurm_use_the_submitit_launcher():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    result = run("train.py", "hydra/launcher=slurm", "--cfg", "hydra", "-p", "hydra.launcher")
    assert result.returncode == 0, result.stderr
    settings = OmegaConf.create(result.stdout)
    assert settings._target_.endswith("SlurmLauncher")
    assert (settings.signal_delay_s, settings.gpus_per_node) == (300, 1)
