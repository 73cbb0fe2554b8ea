import os

import pytest
import torch

from relay_diffusion.trainer import THREADS_KEY, spare_threads


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
    spare_threads(torch.device("cuda", 0))
    assert torch.get_num_threads() == 4
    assert os.environ[THREADS_KEY] == "4"


def test_all_threads_on_a_cpu():
    spare_threads(torch.device("cpu"))
    assert torch.get_num_threads() == 6
    assert THREADS_KEY not in os.environ


def test_the_users_choice_of_threads_holds(monkeypatch):
    monkeypatch.setenv(THREADS_KEY, "6")
    spare_threads(torch.device("cuda", 0))
    assert torch.get_num_threads() == 6
