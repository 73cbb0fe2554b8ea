import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf

from relay_diffusion.errors import UserError
from relay_diffusion.networks import UNet, ops
from relay_diffusion.utils.host import THREADS_KEY, check_gpus, prepare_host

PAGES = """
import resource, sys, torch
from relay_diffusion.utils.host import prepare_host

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages()
given_back = pages()
prepare_host(torch.device("cpu"))
for _ in range(8):  # the heap grows first
    pages()
print(given_back, pages())
"""


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """A process with six threads; OMP_NUM_THREADS is not set."""
    before = torch.get_num_threads()
    monkeypatch.setenv(THREADS_KEY, "")  # so that it is as before afterwards
    monkeypatch.delenv(THREADS_KEY)
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


def test_cpu_threads_are_limited_beside_a_gpu():
    prepare_host(torch.device("cuda", 0))
    assert torch.get_num_threads() == 4
    assert os.environ[THREADS_KEY] == "4"


def test_all_threads_are_used_on_a_cpu():
    prepare_host(torch.device("cpu"))
    assert torch.get_num_threads() == 6
    assert THREADS_KEY not in os.environ


def test_omp_num_threads_is_kept(monkeypatch):
    monkeypatch.setenv(THREADS_KEY, "6")
    prepare_host(torch.device("cuda", 0))
    assert torch.get_num_threads() == 6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_on_a_cpu():
    """Allocating the same large tensors again needs almost no new pages."""
    result = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    given_back, kept = map(int, result.stdout.split())
    assert kept < given_back / 10


@pytest.mark.parametrize(
    ("device", "have_triton", "channels_last", "reported"),
    [
        ("cpu", False, False, []),
        ("cuda", True, True, []),
        ("cuda", False, True, ["Triton is not installed"]),
        ("cuda", True, False, ["network.channels_last=false is slow on a GPU"]),
        ("cuda", False, False, ["Triton is not installed", "network.channels_last=false is slow on a GPU"]),
    ],
)
def test_settings_that_are_slow_on_a_gpu_are_reported(
    monkeypatch, capsys, device, have_triton, channels_last, reported
):
    network = UNet(8, channels=8, channel_mult=[1], blocks=1, attention_resolutions=[], channels_last=channels_last)
    monkeypatch.setattr(ops, "HAVE_TRITON", have_triton)
    ops.report_slow_settings(torch.device(device, 0), {"network.channels_last": network, "another": object()})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(reported)
    for line, part in zip(lines, reported, strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "message"),
    [
        (2, "gpu", 8, "trainer.devices=8: this host has 2 GPUs; use these, or auto"),
        (2, "auto", [0, 2], "trainer.devices=[0, 2]: this host has 2 GPUs, numbered from 0; use these, or auto"),
        (2, "gpu", 2, None),
        (2, "gpu", "auto", None),
        (2, "cpu", 8, None),
        (0, "auto", 8, None),
        (0, "auto", [5], "trainer.devices=[5]: are numbers of GPUs; use a number of CPU processes, as 1"),
        (0, "tpu", [0], None),
        (0, "cpu", [5], "trainer.devices=[5]: are numbers of GPUs; use a number of CPU processes, as 1"),
    ],
)
def test_devices_that_the_host_does_not_have(monkeypatch, gpus, accelerator, devices, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    trainer = OmegaConf.create({"accelerator": accelerator, "devices": devices, "strategy": "auto"})
    with nullcontext() if message is None else pytest.raises(UserError, match=f"^{re.escape(message or '')}$"):
        check_gpus(trainer)
