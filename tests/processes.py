"""Commands of the project that tests start, watch, and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from forked import Fork, can_fork

PATIENCE = 900  # seconds, on a machine that is busy


class Process:
    """A command of the project in a session of its own, its output in a file."""

    def __init__(self, output: Path, arguments: Sequence[object], **environment: str) -> None:
        self.output = output
        command = [sys.executable, *map(str, arguments)]
        env = {**os.environ, **environment}
        output.touch()
        if can_fork():
            self.popen = Fork(command, output.parent, env, start_new_session=True, stdout=output, stderr=output)
            return
        with output.open("ab") as file:
            self.popen = subprocess.Popen(
                command,
                cwd=output.parent,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests may run under nohup
            )

    def text(self) -> str:
        return self.output.read_text()

    def wait(self) -> int:
        return self.popen.wait(PATIENCE)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """To the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)


@contextmanager
def ended(processes: Sequence[Process]) -> Iterator[Sequence[Process]]:
    """None of them outlives the test."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.popen.wait()


def until(condition: Callable[[], object], processes: Sequence[Process]) -> None:
    """Wait for a condition; fail if a process ends before."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        for process in processes:
            assert process.popen.poll() is None, process.text()
        assert time.monotonic() < limit, [process.text() for process in processes]
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """The ranks that a process launched."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = ("comm", "cmdline")  # of a fork, of a new interpreter
    found = {int(child): "".join(Path(f"/proc/{child}/{name}").read_text() for name in names) for child in children}
    return sorted(child for child, text in found.items() if "train.py" in text or "sample.py" in text)


def child_of(pid: int) -> int:
    """The process of the second device, which the first launched."""
    return children_of(pid)[-1]
