"""Measure the scaling efficiency of training on several devices.

python benchmarks/scaling.py [key=value ...]

Runs train.py alternately on one device and on N devices with equal images per device. images/s: median over windows of
the log after the first three. Efficiency: throughput of N devices divided by N times that of one device.

  experiment  name in conf/experiment, 64x64; the images are the emoji   (imagenet_64: the published network)
  devices     number N of devices     (2)
  batch       images on each device   (128)
  windows     windows of 20 steps     (10)
  repeats     runs of each            (2)
  precision   training precision      (bf16-mixed)
  accelerator gpu | cpu               (gpu)
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from timing import environment

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent
STEPS, FIRST = 20, 3  # steps per window; number of skipped windows


@dataclass
class Options:
    """Options of this command; see above."""

    experiment: str = "imagenet_64"
    devices: int = 2
    batch: int = 128
    windows: int = 10
    repeats: int = 2
    precision: str = "bf16-mixed"
    accelerator: str = "gpu"


def speeds(options: Options, devices: int) -> list[float]:
    """Measure images/s of each window."""
    batch = options.batch * devices
    strategy = "single" if devices == 1 else "ddp" if options.accelerator == "gpu" else "ddp_cpu"
    with tempfile.TemporaryDirectory() as run_dir:
        settings = [
            f"experiment={options.experiment}", "data=emoji", "data.dataset.path=demo/emoji-64.zip",
            "data.dataset.subset=train", "data.dataset.cache=true", "network.num_classes=8",
            f"data.batch_size={batch}", "trainer.accumulate_grad_batches=1", f"trainer.precision={options.precision}",
            f"trainer.max_images={batch * STEPS * options.windows}", f"callbacks.log.every_n_images={batch * STEPS}",
            "callbacks.grid.every_n_images=0", "~callbacks.checkpoints", f"run_dir={run_dir}",
            "logger=csv", f"strategy={strategy}",
            f"trainer.devices={devices}", f"trainer.accelerator={options.accelerator}",
        ]  # fmt: skip
        result = subprocess.run(
            [sys.executable, "train.py", *settings], cwd=PROJECT, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise UserError(f"train.py failed: {result.stderr.strip()[-500:]}")
        (log,) = Path(run_dir).glob("log/**/metrics.csv")
        with log.open() as file:
            return [float(row["train/images_per_second"]) for row in csv.DictReader(file)][FIRST:]


def run(options: Options) -> None:
    """Print one row for each run, then the efficiency."""
    if options.windows <= FIRST:
        raise UserError(f"windows={options.windows}: must be more than {FIRST}")
    if options.repeats < 1:
        raise UserError(f"repeats={options.repeats}: must be at least 1")
    print(environment())
    medians: dict[int, list[float]] = {1: [], options.devices: []}
    for _ in range(options.repeats):
        for devices in (1, options.devices):
            times = sorted(speeds(options, devices))
            medians[devices].append(statistics.median(times))
            print(
                f"{options.experiment}, {devices} x {options.batch}: {medians[devices][-1]:9.1f} images/s "
                f"({times[0]:.1f}-{times[-1]:.1f})",
                flush=True,
            )
    efficiency = max(medians[options.devices]) / (options.devices * max(medians[1]))
    print(f"efficiency of {options.devices} devices: {efficiency:.3f}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["devices=2"], __doc__ or "", Options, run))
