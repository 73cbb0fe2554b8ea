"""Run commands in forks of a process that has imported the libraries, which saves seconds per command.

As a script, this file is that process. It imports no module of the project: every command does that itself.
"""

from __future__ import annotations

import atexit
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
from functools import lru_cache
from pathlib import Path

LIBRARIES = ("hydra", "lightning.pytorch", "torchmetrics", "PIL.Image", "safetensors.torch")


@lru_cache(maxsize=1)
def _server() -> subprocess.Popen[str]:
    """One process per test worker."""
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # closes its standard input, which ends it
    return server


def run_forked(arguments: list[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Do what `subprocess.run([sys.executable, *arguments])` does; output is captured as text."""
    server, expired = _server(), threading.Event()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        request = {"arguments": arguments, "cwd": str(cwd), "files": [str(file) for file in files]}
        server.stdin.write(json.dumps(request | {"environment": dict(os.environ)}) + "\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        timer = threading.Timer(timeout, lambda: (expired.set(), os.kill(pid, signal.SIGKILL)))
        timer.start()
        code = int(server.stdout.readline())
        timer.cancel()
        output = [file.read_text() for file in files]
    if expired.is_set():
        raise subprocess.TimeoutExpired(arguments, timeout, *output)
    return subprocess.CompletedProcess(arguments, code, *output)


def _serve() -> list[str]:
    """Fork a process for every request; return in that process, with the arguments of its command."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # collections in the forks would copy the memory that they share
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            files = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for file in request["files"]]
            for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
                os.dup2(file, number)
                os.close(file)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["environment"])
            arguments: list[str] = request["arguments"]
            return arguments
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def _start(arguments: list[str]) -> None:
    """Run a script or `-m module` as a new interpreter does."""
    sys.orig_argv[1:] = arguments
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


if __name__ == "__main__":
    try:
        _start(_serve())
    except SystemExit as ended:
        _end(ended.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _end(1)
    _end(0)
