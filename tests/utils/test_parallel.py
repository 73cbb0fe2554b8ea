"""Threads that work in the background."""

import sys
import threading

import pytest

from relay_diffusion.utils import parallel
from relay_diffusion.utils.parallel import Background, map_in_order, repeated

LATE = 10  # seconds after which a thread has failed


@pytest.fixture
def background():
    """Return a function that builds a Background; all are closed."""
    built = []

    def build(function):
        built.append(Background(function))
        return built[-1]

    yield build
    for each in built:
        each.close()


def test_items_are_processed_while_the_caller_continues(background):
    go, done = threading.Event(), []
    work = background(lambda item: (go.wait(LATE), done.append(item)))
    work.start(range(9))
    assert done == []
    go.set()
    work.wait()
    assert sorted(done) == list(range(9))


def test_two_batches_are_in_progress_at_most(background):
    go, done = threading.Event(), []

    def process(item):
        go.wait(LATE)
        done.append(item)

    work = background(process)
    work.start(range(5))
    threading.Timer(0.02, go.set).start()
    work.start([5])
    assert set(done) >= set(range(5))


def test_an_interruption_loses_no_batch(monkeypatch):
    done = []
    work = Background(done.append)
    work.start([1])
    monkeypatch.setattr(parallel, "_raise_errors", lambda _: sys.exit(143))
    with pytest.raises(SystemExit):  # a signal while the caller waits for the previous batch
        work.start([2])
    work.close()
    assert done == [1, 2]


def test_the_next_call_raises_the_error_and_the_rest_is_dropped(background, monkeypatch):
    monkeypatch.setattr(parallel, "usable_cores", lambda: 1)
    done = []
    work = background(lambda item: done.append(1 / item))
    work.start([1, 0, 2, 3])
    with pytest.raises(ZeroDivisionError):
        work.start([])
    assert done == [1]
    work.start([0])
    with pytest.raises(ZeroDivisionError):
        work.wait()
    work.wait()  # once


def test_closing_finishes_the_batch_and_ends_the_threads():
    before, done = threading.active_count(), []
    work = Background(done.append)
    work.start(range(100))
    work.close()
    assert sorted(done) == list(range(100))
    assert threading.active_count() == before
    failing = Background(lambda item: 1 / item)
    failing.start([0])
    failing.close()  # while another error is being reported


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (3, 3), (200, parallel.MAX_THREADS)])
def test_there_are_as_many_threads_as_usable_cores(background, monkeypatch, cores, threads):
    monkeypatch.setattr(parallel, "usable_cores", lambda: cores)
    together = threading.Barrier(threads)
    work = background(lambda _: together.wait(LATE))
    work.start(range(threads))
    work.wait()
    names = set()
    work = background(lambda _: names.add(threading.current_thread().name))
    work.start(range(500))
    work.wait()
    assert len(names) <= threads


def test_results_keep_their_order():
    assert list(map_in_order(lambda item: item * 2, range(50))) == list(range(0, 100, 2))


def test_a_function_is_repeated_until_the_block_ends():
    calls, twice = [], threading.Event()

    def call():
        calls.append(1)
        if len(calls) == 2:
            twice.set()

    with repeated(call, 0.001):
        assert twice.wait(LATE)
    count, before = len(calls), threading.active_count()
    with pytest.raises(KeyError), repeated(call, 60):
        raise KeyError
    assert len(calls) == count
    assert threading.active_count() == before
