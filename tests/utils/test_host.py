import os
import subprocess
import sys

import pytest
import torch

from relay_diffusion.networks import UNet, ops
from relay_diffusion.utils.host import THREADS_KEY, prepare_host

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
