"""Run commands in forks of a process that has imported what they need, which saves six seconds per process.

As a script, this file is that process, the fork server. It also composes both configurations once, because that fills
caches of Hydra. A command that launches ranks first forks a fork server for them.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

CONF = Path(__file__).parent.parent / "conf"
MODULES = (
    "hydra", "lightning.pytorch", "torchmetrics", "PIL.Image", "safetensors.torch", "torch.distributed.run",
    "torch.utils.serialization.config", "relay_diffusion.cli.main", "relay_diffusion.sampling.run",
    "relay_diffusion.training.callbacks", "relay_diffusion.training.loggers", "relay_diffusion.training.run",
)  # fmt: skip
LAUNCHERS = (  # modules that start ranks by `subprocess.Popen`
    "lightning.pytorch.strategies.launchers.subprocess_script",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler",
)
LAUNCHING = ("strategy=ddp", "torch.distributed.run")  # in the arguments of commands that start ranks
PR_SET_CHILD_SUBREAPER = 36

Server = tuple[TextIO, TextIO]  # requests to it, replies from it


class Fork:
    """What `subprocess.Popen` is, for a Python command in a fork of the fork server."""

    def __init__(
        self,
        args: Sequence[str],
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        start_new_session: bool = False,
        stdout: str | Path | None = None,
        stderr: str | Path | None = None,
        server: Server | None = None,
    ) -> None:
        """`args` start with the interpreter; output is appended to files."""
        self.args, self.returncode, self._lock = args, None, threading.Lock()
        requests, replies = server or _server()
        request = {
            "arguments": args[1:],
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(env or os.environ),
            "output": [path and str(path) for path in (stdout, stderr)],
            "session": start_new_session,
        }
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        self.pid = int(replies.readline())

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        start = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() > start + timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def can_fork() -> bool:
    """CUDA needs a new process, and only Linux lets a process adopt orphans."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


def run_forked(arguments: list[str], cwd: Path, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Do what `subprocess.run([sys.executable, *arguments])` does; output is captured as text."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        env = os.environ | environment
        process = Fork([sys.executable, *arguments], cwd, env, stdout=files[0], stderr=files[1])
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise subprocess.TimeoutExpired(arguments, timeout, *(file.read_text() for file in files)) from None
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))


@lru_cache(maxsize=1)
def _server() -> Server:
    """One fork server per test worker."""
    _adopt_orphans()
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # closes its standard input, which ends it
    assert server.stdin is not None
    assert server.stdout is not None
    return server.stdin, server.stdout


def _adopt_orphans() -> None:
    """Become the parent of descendants whose parent exits: so of the forks of the fork server."""
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def _serve(requests: TextIO, replies: TextIO) -> dict[str, Any]:
    """Fork a process for every request; return its request in that process."""
    for line in requests:
        request: dict[str, Any] = json.loads(line)
        started, ready = os.pipe()
        intermediate = os.fork()
        if intermediate == 0:
            intermediate = os.getpid()
            if os.fork():
                os._exit(0)  # makes the requesting process the parent of the fork
            while os.getppid() == intermediate:
                time.sleep(0.001)
            if request["session"]:
                os.setsid()
            os.write(ready, str(os.getpid()).encode())
            os.close(started)
            os.close(ready)
            for stream in {requests, replies} - {sys.stdin, sys.stdout}:
                stream.close()
            return request
        os.waitpid(intermediate, 0)
        print(os.read(started, 32).decode(), file=replies, flush=True)
        os.close(started)
        os.close(ready)
    os._exit(0)


def _set_up(request: dict[str, Any]) -> list[str]:
    """Give this fork the files, directory and environment of its command; return the arguments."""
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for file in request["output"] if file]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments: list[str] = request["arguments"]
    Path("/proc/self/comm").write_text(next(Path(word).name for word in arguments if not word.startswith("-")))
    return arguments


def _fork_server_of_ranks() -> dict[str, Any] | None:
    """Fork a server for the ranks that this command launches; return a rank's request in that rank."""
    _adopt_orphans()
    pipes = [os.pipe() for _ in range(2)]
    (read_requests, write_requests), (read_replies, write_replies) = pipes
    if os.fork() == 0:
        os.close(write_requests)  # this server ends when the command does
        os.close(read_replies)
        return _serve(os.fdopen(read_requests), os.fdopen(write_replies, "w"))
    os.close(read_requests)
    os.close(write_replies)
    popen = partial(Fork, server=(os.fdopen(write_requests, "w"), os.fdopen(read_replies)))
    lightning, torchrun = map(importlib.import_module, LAUNCHERS)
    lightning.subprocess = SimpleNamespace(Popen=popen)  # type: ignore[attr-defined]
    torchrun.Popen = popen  # type: ignore[attr-defined]
    return None


def _start(arguments: list[str]) -> None:
    """Run a script or `-m module` as a new interpreter does."""
    if arguments[0] == "-u":  # torchrun
        del arguments[0]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0] == "-m":
        sys.argv[:] = ["-m", *arguments[2:]]
        sys.path[:1] = [str(Path.cwd()), *paths]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path[:1] = [str(Path(arguments[0]).resolve().parent), *paths]
        runpy.run_path(arguments[0], run_name="__main__")


def _end(code: object) -> None:
    """End as an interpreter does, without the second that it needs to take the libraries apart."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


def _compose() -> None:
    """Compose both configurations; later compositions are faster."""
    import hydra

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        hydra.compose("train")
        hydra.compose("sample")


def _main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    _compose()
    gc.freeze()  # collections in the forks would copy the memory that they share
    arguments = _set_up(_serve(sys.stdin, sys.stdout))
    if any(argument.startswith(LAUNCHING) for argument in arguments) and "LOCAL_RANK" not in os.environ:
        request = _fork_server_of_ranks()
        if request is not None:
            arguments = _set_up(request)
    _start(arguments)


if __name__ == "__main__":
    try:
        _main()
    except SystemExit as ended:
        _end(ended.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _end(1)
    _end(0)
