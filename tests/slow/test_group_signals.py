"""Signals to all processes of a run (`scancel`, `timeout`, closed terminal)."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from processes import Process, ended, until
from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.utils.distributed import SIGNALS
from support import PROJECT, TINY

END = 10**7  # images


def command(tmp_path, small_zip, *options):
    return [
        PROJECT / "train.py", *TINY, "resolution=16", f"data.dataset.path={small_zip}", f"run_dir={tmp_path / 'run'}",
        "callbacks.checkpoints.every_n_images=1000000", f"trainer.max_images={END}", "callbacks.log.every_n_images=40",
        *options,
    ]  # fmt: skip


def trains(tmp_path):
    """Return whether the log has a row."""
    file = tmp_path / "run/log/metrics.csv"
    return file.exists() and len(file.read_text().splitlines()) > 1


def saved(tmp_path):
    return torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["images_seen"]


def processes_of(session):
    """List the remaining processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(stat.parent.name)
    return found


@pytest.mark.parametrize(
    ("number", "workers", "strategy"),
    [
        (signal.SIGTERM, 0, []),
        (signal.SIGHUP, 2, []),
        (signal.SIGTERM, 2, ["strategy=ddp_cpu"]),
        (signal.SIGUSR1, 0, ["strategy=ddp_cpu"]),
    ],
)
def test_a_signal_to_the_process_group_saves_and_stops(tmp_path, small_zip, number, workers, strategy):
    arguments = command(tmp_path, small_zip, f"data.num_workers={workers}", *strategy)
    with ended([Process(tmp_path / "run.txt", arguments)]) as (process,):
        until(lambda: trains(tmp_path), [process])
        os.killpg(process.popen.pid, number)
        assert process.wait() == 128 + number, process.text()
        until(lambda: not processes_of(process.popen.pid), [])  # no worker stays
    assert 0 < saved(tmp_path) < END
    assert f"stopped by {number.name}: the same command continues" in process.text()
    assert "Traceback" not in process.text()
    assert "killed by signal" not in process.text()


def take_terminal():
    """Make standard input the controlling terminal of a new process."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_closed_terminal_saves_and_stops(tmp_path, small_zip):
    ours, theirs = pty.openpty()
    arguments = [sys.executable, *map(str, command(tmp_path, small_zip, "data.num_workers=2"))]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        while not trains(tmp_path):
            assert process.poll() is None
            try:
                os.read(ours, 2**16)
            except BlockingIOError:
                time.sleep(0.05)
        os.close(ours)
        assert process.wait(900) == 128 + signal.SIGHUP
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert 0 < saved(tmp_path) < END


class Hanging(ImageDataset):
    """Images whose decoding never ends."""

    def __getitem__(self, index):
        time.sleep(600)
        return super().__getitem__(index)


class Trainer:
    """Trainer attributes that a data module reads."""

    global_rank, world_size, accumulate_grad_batches = 0, 1, 1
    lightning_module = SimpleNamespace(images_seen=0)


def test_workers_ignore_signals_from_their_start_and_end_with_the_trainer(small_zip):
    data = ImageDataModule(Hanging(small_zip, 16), 4, num_workers=2)
    data.trainer = Trainer()
    loader = data.train_dataloader()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    workers = iter(loader)._workers  # just started, perhaps before their first line
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    for worker in workers:
        status = Path(f"/proc/{worker.pid}/status").read_text()
        blocked = int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16)
        assert all(blocked >> (number - 1) & 1 for number in SIGNALS)
        for number in SIGNALS:
            subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)  # as from elsewhere
    time.sleep(1)
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()  # as the loader and Python do at the end
        worker.join(60)
        assert worker.exitcode == 0
