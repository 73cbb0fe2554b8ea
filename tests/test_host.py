import os
import resource

import pytest
import torch

from relay_diffusion.host import THREADS_KEY, prepare_host


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """A process with six threads, whose user said nothing of them."""
    before = torch.get_num_threads()
    monkeypatch.setenv(THREADS_KEY, "")  # so that it is as before afterwards
    monkeypatch.delenv(THREADS_KEY)
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


def test_few_threads_beside_a_gpu():
    prepare_host(torch.device("cuda", 0))
    assert torch.get_num_threads() == 4
    assert os.environ[THREADS_KEY] == "4"


def test_all_threads_on_a_cpu():
    prepare_host(torch.device("cpu"))
    assert torch.get_num_threads() == 6
    assert THREADS_KEY not in os.environ


def test_freed_memory_is_kept_on_a_cpu():
    """The same large tensor again costs no new pages."""
    torch.set_num_threads(1)
    prepare_host(torch.device("cpu"))
    for _ in range(3):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2**24 * 4 / 4096


def test_the_users_choice_of_threads_holds(monkeypatch):
    monkeypatch.setenv(THREADS_KEY, "6")
    prepare_host(torch.device("cuda", 0))
    assert torch.get_num_threads() == 6
