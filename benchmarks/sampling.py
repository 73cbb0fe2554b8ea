"""Compare the throughput of sample.py with that of its network.

python benchmarks/sampling.py [key=value ...]

Runs sample.py with all images and with two batches; the difference is its time without the start (imports, weights,
first evaluations). The network samples the same seeds and prompts in batches of the same size, without files, after
two batches of warm-up; its prompts are encoded before. Medians of the repeats.

  relay       name in conf/relay                          (emoji)
  overrides   more overrides of sample.py, with spaces between them   ("")
  count       images, a multiple of the batch             (10240)
  batch       images per batch                            (256)
  format      png | zip                                   (png)
  precision   precision of the networks                   (bf16-mixed)
  accelerator gpu | cpu | auto                            (auto)
  repeats     runs of each                                (1)
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import autocast_dtype
from omegaconf import DictConfig
from timing import environment, synchronize

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.config import compose
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.options import sampling_options
from relay_diffusion.sampling.prompts import PromptStates
from relay_diffusion.sampling.run import build_relay, make_plan
from relay_diffusion.utils.host import prepare_host

PROJECT = Path(__file__).resolve().parent.parent
SHORT = 2  # batches of the run that measures the start, and of the network's warm-up


@dataclass
class Options:
    """Options of this command; see above."""

    relay: str = "emoji"
    overrides: str = ""
    count: int = 10240
    batch: int = 256
    format: str = "png"
    precision: str = "bf16-mixed"
    accelerator: str = "auto"
    repeats: int = 1


def settings(options: Options, count: int) -> list[str]:
    """List the overrides of sample.py for `count` images."""
    return [
        f"relay={options.relay}", f"seeds=0-{count - 1}", f"batch_size={options.batch}", f"format={options.format}",
        f"trainer.precision={options.precision}", f"trainer.accelerator={options.accelerator}",
        *options.overrides.split(),
    ]  # fmt: skip


def seconds_of_command(options: Options, count: int) -> float:
    """Time a run of sample.py."""
    with tempfile.TemporaryDirectory() as output:
        began = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "sample.py", *settings(options, count), f"output={output}/run"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        elapsed = time.perf_counter() - began
    if result.returncode:
        raise UserError(f"sample.py failed: {result.stderr.strip()[-500:]}")
    return elapsed


@torch.inference_mode()
def seconds_of_network(options: Options, cfg: DictConfig) -> float:
    """Time the network for all images after the warm-up."""
    on_gpu = torch.cuda.is_available() and options.accelerator != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    prepare_host(device)
    relay = build_relay(cfg.relay).to(device).eval()
    plan = make_plan(sampling_options(cfg), relay)
    half = autocast_dtype(options.precision)
    states, negative = None, None
    if plan.prompts is not None:  # the relay takes text; without prompts sample.py gives it empty ones
        states = PromptStates(relay, plan)
        states.prepare(range(options.count))
        negative = states.lookup([plan.negative_prompt]) if plan.negative_prompt.strip() else None
    began = 0.0
    for first in range(0, options.count, options.batch):
        if first == SHORT * options.batch:
            synchronize()
            began = time.perf_counter()
        chosen = slice(first, first + options.batch)
        labels = torch.tensor(plan.labels[chosen]) if relay.num_classes else None
        prompts = [plan.prompt(position) for position in range(options.count)[chosen]]
        text = None if states is None else states.lookup(prompts)
        with torch.autocast(device.type, half, enabled=half is not None):
            relay.finish(relay.sample(plan.seeds[chosen], labels, text=text, negative=negative))
    synchronize()
    return time.perf_counter() - began


def run(options: Options) -> None:
    """Print images/s of sample.py and of the network, then their ratio."""
    for name in ("batch", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1")
    if options.count % options.batch or options.count <= SHORT * options.batch:
        least = (SHORT + 1) * options.batch
        raise UserError(f"count={options.count}: must be a multiple of batch={options.batch}, at least {least}")
    cfg = compose("sample", settings(options, options.count))
    validate_sampling(cfg)  # report mistakes before the first run
    print(environment())
    whole, without_start, network = [], [], []
    timed = options.count - SHORT * options.batch
    for _ in range(options.repeats):
        short = seconds_of_command(options, SHORT * options.batch)
        whole.append(seconds_of_command(options, options.count))
        without_start.append(whole[-1] - short)
        network.append(seconds_of_network(options, cfg))
    if min(without_start) <= 0:
        raise UserError(f"count={options.count}: sample.py takes no longer than for {SHORT} batches; raise it")
    rows = [
        ("sample.py", options.count, whole),
        ("sample.py without its start", timed, without_start),
        ("network alone", timed, network),
    ]
    print(f"{options.relay}, {options.count:,} images in batches of {options.batch}, {options.format}")
    speeds = [count / statistics.median(times) for _, count, times in rows]
    for (name, count, times), speed in zip(rows, speeds, strict=True):
        spread = f"({count / max(times):.1f}-{count / min(times):.1f})"
        ratio = f"{speed / speeds[-1]:.3f} of the network"
        print(f"{name:28} {statistics.median(times):8.1f} s  {speed:8.1f} images/s  {spread:17}  {ratio}", flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["repeats=1"], __doc__ or "", Options, run))
