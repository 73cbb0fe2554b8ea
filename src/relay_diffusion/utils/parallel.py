"""Threads: results in order, work in the background, repeated calls."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 16  # of background work; more threads would mostly wait for the interpreter lock


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply `function` in threads; yield results in the order of `items`.

    Decoders release the interpreter lock. Only a few items per thread are in flight, which limits memory.
    """
    threads = usable_cores()
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Background(Generic[Item]):
    """Apply a function to batches of items in threads.

    Two batches are in progress at most, which limits memory. After an error the rest of its batch is dropped; the next
    call of `start` or `wait` raises the error.
    """

    def __init__(self, function: Callable[[Item], object]) -> None:
        self._function, self._threads = function, min(usable_cores(), MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._threads)
        self._running: list[Future[None]] = []

    def start(self, items: Iterable[Item]) -> None:
        """Process `items` while the caller continues, once the previous batch is finished."""
        todo = deque(items)
        # one task per thread: submitting every item would hold up the caller
        tasks = [self._pool.submit(self._process, todo) for _ in range(min(self._threads, len(todo)))]
        previous, self._running = self._running, tasks
        _raise_errors(previous)

    def wait(self) -> None:
        """Wait for the batches in progress and raise the first error."""
        running, self._running = self._running, []
        _raise_errors(running)

    def close(self) -> None:
        """Finish the batches in progress without raising their errors; end the threads."""
        self._pool.shutdown()

    def _process(self, todo: deque[Item]) -> None:
        while todo:
            try:
                item = todo.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                self._function(item)
            except BaseException:
                todo.clear()
                raise


def _raise_errors(tasks: Iterable[Future[None]]) -> None:
    for task in tasks:
        task.result()


@contextmanager
def repeated(function: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call `function` in a thread every `seconds` during the block."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            function()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
