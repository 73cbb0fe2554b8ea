"""Runs of SLURM and torchrun on several nodes: signals and kills."""

import os
import random
import signal
import socket
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from processes import Process, child_of, children_of, ended, until
from support import PROJECT, TINY, assert_same_weights, pythonpath, weights_of


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def checkpoints(directory: Path) -> list[Path]:
    return list(directory.glob("outputs/*/*/checkpoints/last.ckpt"))


def images_seen(path: Path) -> int:
    return torch.load(path, weights_only=True)["images_seen"]


def two_nodes(data: Path) -> list[str]:
    return [
        str(PROJECT / "train.py"), *TINY, "resolution=16", f"data.dataset.path={data}", "trainer.max_images=320",
        "callbacks.checkpoints.every_n_images=40", "strategy=ddp_cpu", "trainer.devices=1", "trainer.num_nodes=2",
    ]  # fmt: skip


def slurm(directory: Path, data: Path, number: int, port: int) -> list[Process]:
    """Start the two tasks of `srun` on two nodes for job `number`."""
    tools = directory / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {directory}/scontrol.txt\n')
    (tools / "scontrol").chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(number), "SLURM_JOB_NAME": "relay", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PATH": f"{tools}:{os.environ['PATH']}",
    }  # fmt: skip
    return [
        Process(directory / f"task{rank}.txt", two_nodes(data), **job, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank))
        for rank in range(2)
    ]


def torchrun(directory: Path, data: Path, number: int, port: int) -> list[Process]:
    """Start two agents of `torchrun`, one per node."""
    return [
        Process(
            directory / f"task{rank}.txt",
            ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}",
             "--master-addr=127.0.0.1", f"--master-port={port}", f"--rdzv-id=job{number}", *two_nodes(data)],
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("launch", "number", "codes"),
    [(slurm, signal.SIGUSR1, {0, 128 + signal.SIGUSR1}), (torchrun, signal.SIGTERM, None)],
)
def test_a_job_on_two_nodes_stops_at_a_signal_and_continues(tmp_path, small_zip, launch, number, codes):
    with ended(launch(tmp_path, small_zip, 4711, free_port())) as tasks:
        until(lambda: checkpoints(tmp_path), tasks)
        for task in tasks:
            task.popen.send_signal(number)
        ends = {task.wait() for task in tasks}
    assert codes is None or ends == codes, [task.text() for task in tasks]
    (last,) = checkpoints(tmp_path)  # one directory for all ranks
    stopped = images_seen(last)
    assert 0 < stopped < 320
    text = tasks[0].text()
    assert f"stopped by {number.name}: the same command continues" in text
    assert "UserWarning" not in text
    if launch is slurm:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"

    with ended(launch(tmp_path, small_zip, 4711, free_port())) as tasks:
        assert {task.wait() for task in tasks} == {0}, [task.text() for task in tasks]
    assert checkpoints(tmp_path) == [last]
    assert images_seen(last) == 320
    assert "continues" in tasks[0].text()
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1
    assert not list(tmp_path.rglob(".hydra"))


KILLS = int(os.environ.get("RELAY_DIFFUSION_KILLS", "2"))  # docs/robustness.md: 30
MANY = KILLS >= 10


def killed_sometime(process: Process, chance: random.Random, works: Callable[[], object], seconds: float) -> bool:
    """Kill all processes (SIGKILL) at a random time.

    Mostly after the first result. Returns False if they ended before.
    """
    if chance.random() < 0.75:
        while not works() and process.popen.poll() is None:
            time.sleep(0.02)
    try:
        process.popen.wait(chance.uniform(0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.popen.wait()
        return True
    return False


@pytest.fixture(scope="module")
def killed_training(small_zip):
    """Arguments of a training with two processes; the tests add run_dir."""
    images = (400 if MANY else 120) * KILLS
    return [
        PROJECT / "train.py", *TINY, "resolution=16", f"data.dataset.path={small_zip}", "network.dropout=0.1",
        "callbacks.checkpoints.every_n_images=20", f"trainer.max_images={images}", "strategy=ddp_cpu",
        "callbacks.log.every_n_images=130",  # no divisor: the last row is of the end of training
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, killed_training):
    """Return the checkpoint of that training, which nothing interrupts."""
    root = tmp_path_factory.mktemp("whole")
    with ended([Process(root / "whole.txt", [*killed_training, f"run_dir={root / 'run'}"])]) as (whole,):
        assert whole.wait() == 0, whole.text()
    return root / "run/checkpoints/last.ckpt"


def test_training_that_is_killed_ends_with_the_same_weights(tmp_path, killed_training, undisturbed):
    """Repeated kills of two processes do not change the weights."""
    chance, instants = random.Random(0), []
    last = tmp_path / "parts/checkpoints/last.ckpt"
    for kill in range(KILLS + 1):
        command = [*killed_training, f"run_dir={tmp_path / 'parts'}"]
        with ended([Process(tmp_path / f"part{kill}.txt", command)]) as (part,):
            if kill < KILLS:
                assert killed_sometime(part, chance, last.exists, 3 if MANY else 1), part.text()
                instants.append(images_seen(last) if last.exists() else 0)
            else:
                assert part.wait() == 0, part.text()
    assert instants == sorted(instants)  # never less than before
    assert instants[-1] > 0
    assert images_seen(last) == images_seen(undisturbed)
    assert_same_weights(weights_of(undisturbed), weights_of(last))
    print(f"killed after {instants} images")


def test_torchrun_standalone_continues_after_a_kill_with_the_same_weights(tmp_path, killed_training, undisturbed):
    """SIGKILL to torchrun leaves its ranks alone, so they are killed too."""
    last = tmp_path / "run/checkpoints/last.ckpt"
    command = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *killed_training,
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with ended([Process(tmp_path / "first.txt", command)]) as (first,):
        until(last.exists, [first])
        ranks = children_of(first.popen.pid)
        first.kill()
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
    killed_at = images_seen(last)
    assert 0 < killed_at < images_seen(undisturbed)
    with ended([Process(tmp_path / "second.txt", command)]) as (second,):
        assert second.wait() == 0, second.text()
    assert "run: continues " in second.text()
    assert "sync_dist" not in second.text()  # Lightning's advice on values that all ranks share already
    assert images_seen(last) == images_seen(undisturbed)
    assert_same_weights(weights_of(undisturbed), weights_of(last))


def test_sampling_that_is_killed_makes_the_same_files(tmp_path, relay_runs):
    """Killed and restarted processes sample the files of an uninterrupted one."""
    chance, seeds = random.Random(1), 500 if MANY else 32
    relay = [
        PROJECT / "sample.py", "relay=two_stages", f"seeds=0-{seeds - 1}", "batch_size=8", "trainer.accelerator=cpu",
        *(f"relay.stages.{name}.path={relay_runs / name}" for name in ("base", "relay")),
        f"relay.stages.base.changes.sampler.steps={60 if MANY else 30}", "picture=0",
    ]  # fmt: skip
    with ended([Process(tmp_path / "whole.txt", [*relay, f"output={tmp_path / 'whole'}"])]) as (whole,):
        assert whole.wait() == 0, whole.text()
    command, made, kill = [*relay, "strategy=ddp_cpu", f"output={tmp_path / 'parts'}"], [], 0
    while True:
        with ended([Process(tmp_path / f"part{kill}.txt", command)]) as (part,):
            kill += 1
            if kill > min(KILLS, 10):
                assert part.wait() == 0, part.text()
                break
            if not killed_sometime(part, chance, lambda: "sampling:" in part.text(), 2 if MANY else 0.5):
                assert part.popen.returncode == 0, part.text()
                break
        made.append(len(list((tmp_path / "parts").rglob("seed*.png"))))
    files = [
        {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
        for name in ("whole", "parts")
    ]
    assert len(files[0]) == seeds
    assert files[0].keys() == files[1].keys()
    assert files[0] == files[1]
    assert made == sorted(made)
    print(f"killed after {made} images")


def test_an_error_of_one_rank_is_reported_and_ends_all(tmp_path, small_zip):
    """One of two ranks reads a damaged image during training."""
    images = tmp_path / "images"
    with zipfile.ZipFile(small_zip) as archive:
        archive.extractall(images)
    damaged = sorted(images.rglob("*.png"))[7]
    damaged.write_bytes(damaged.read_bytes()[:200])
    command = [PROJECT / "train.py", *TINY, "resolution=16", f"data.dataset.path={images}", "strategy=ddp_cpu"]
    with ended([Process(tmp_path / "run.txt", [*command, f"run_dir={tmp_path / 'run'}"])]) as (process,):
        assert process.wait() == 2, process.text()
    assert f"'train/{damaged.name}' in {images} cannot be decoded" in process.text()
    assert "Traceback" not in process.text()


def test_a_bug_of_one_rank_is_shown_once_and_ends_all(tmp_path, small_zip):
    """The traceback of the lost connection must not hide the first one."""
    (tmp_path / "broken.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Broken(Callback):\n"
        "    def on_train_start(self, trainer, module):\n"
        "        if trainer.global_rank == 1:\n"
        "            raise ZeroDivisionError('a bug')\n"
    )
    command = [
        PROJECT / "train.py", *TINY, "resolution=16", f"data.dataset.path={small_zip}", "strategy=ddp_cpu",
        "+callbacks.broken._target_=broken.Broken", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with ended([Process(tmp_path / "run.txt", command, PYTHONPATH=pythonpath(tmp_path))]) as (process,):
        assert process.wait() == 1, process.text()
    text = process.text()
    assert text.count("ZeroDivisionError: a bug") == 1
    assert "error: rank 1 failed: see its error message" in text
    assert "RuntimeError" not in text


def test_a_signal_to_one_of_two_that_sample_ends_both_and_one_continues(tmp_path, relay_runs):
    command = [
        PROJECT / "sample.py", "relay=two_stages", "seeds=0-15", "batch_size=2", "trainer.accelerator=cpu", "picture=0",
        *(f"relay.stages.{name}.path={relay_runs / name}" for name in ("base", "relay")),
        "relay.stages.base.changes.sampler.steps=60", f"output={tmp_path / 'samples'}",
    ]  # fmt: skip
    images = tmp_path / "samples/images"
    with ended([Process(tmp_path / "first.txt", [*command, "strategy=ddp_cpu"])]) as (process,):
        until(lambda: list(images.rglob("seed*.png")), [process])
        os.kill(child_of(process.popen.pid), signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM, process.text()
    assert process.text().count("stopped by SIGTERM: the same command continues") == 1
    assert 0 < len(list(images.rglob("*.png"))) < 16
    with ended([Process(tmp_path / "second.txt", [*command, "batch_size=16"])]) as (process,):
        assert process.wait() == 0, process.text()
    assert len(list(images.rglob("*.png"))) == 16
