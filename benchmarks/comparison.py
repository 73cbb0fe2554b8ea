"""Measure sample quality against sampling cost for many settings.

python benchmarks/comparison.py [key=value ...]

curves  yaml file with the points of each curve by name; a point is a text of overrides of sample.py
                                                      (benchmarks/emoji.yaml)
output  CSV file to which a row is added for each point and repeat; existing rows are skipped
                                                      (outputs/comparison/points.csv)
only    comma-separated names of curves               (all)
points  number of points of each curve, from the first (all)
count   images per point, with class frequencies of the reference   (3121)
repeats number of repeats of each point, with different seeds (3)
batch   images per batch                              (256)
precision  precision of the networks                  (bf16-mixed)
weights Inception weights                             (those that are installed)
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timing import environment

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.config import compose
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluator
from relay_diffusion.models.relay import Relay
from relay_diffusion.networks.flops import forward_flops
from relay_diffusion.sampling.options import sampling_options
from relay_diffusion.sampling.run import build_evaluator, build_relay, make_plan
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.host import prepare_host
from relay_diffusion.utils.progress import progress

COLUMNS = ["curve", "overrides", "repeat", "images", "evaluations", "tflop", "seconds", "fid", "sfid", "device"]


@dataclass
class Options:
    """Options of this command; see above."""

    curves: str = "benchmarks/emoji.yaml"
    output: str = "outputs/comparison/points.csv"
    only: str = ""
    points: int | None = None
    count: int = 3121
    repeats: int = 3
    batch: int = 256
    precision: str = "bf16-mixed"
    weights: str | None = None


def points(options: Options) -> list[tuple[str, str]]:
    """List (curve, overrides) of every point."""
    path = Path(options.curves)
    if not path.is_file():
        raise UserError(f"curves={options.curves}: no such file")
    curves = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(curves, dict) or not all(isinstance(v, list) for v in curves.values()):
        raise UserError(f"curves={options.curves}: must hold names, each with a list of overrides")
    chosen = options.only.split(",") if options.only else list(curves)
    if unknown := [name for name in chosen if name not in curves]:
        raise UserError(f"only={unknown[0]} is not in {options.curves}; available: {', '.join(curves)}")
    return [(name, str(overrides)) for name in chosen for overrides in curves[name][: options.points]]


def settings(options: Options, overrides: str, repeat: int) -> DictConfig:
    """Compose the config of sample.py for a point."""
    first = repeat * options.count
    given = ["mode=evaluate", "class=reference", f"seeds={first}-{first + options.count - 1}", *overrides.split()]
    if options.weights is not None:
        given.append(f"metrics.evaluator.inception.weights={options.weights}")
    cfg = compose("sample", given)
    validate_sampling(cfg)
    return cfg


def cost(relay: Relay) -> tuple[str, float]:
    """Compute evaluations per stage ("47+27") and TFLOP per image."""
    evaluations = {name: sampler.evaluations for name, sampler in relay.samplers.items()}
    operations = sum(
        forward_flops(stage.denoiser.network) * evaluations[name] * (1 if stage.guidance_scale == 1 else 2)
        for name, stage in relay.chain().items()
    )
    return "+".join(map(str, evaluations.values())), operations / 1e12


def batches(relay: Relay, cfg: DictConfig, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (finished images, positions) of a plan on the relay's device."""
    plan = make_plan(sampling_options(cfg), relay)
    for first in range(0, len(plan.seeds), batch):
        labels = torch.tensor(plan.labels[first : first + batch])
        images = relay.sample(plan.seeds[first : first + batch], labels if relay.num_classes else None)
        yield relay.finish(images), torch.arange(first, first + len(images))


@torch.no_grad()
def measured(options: Options, cfg: DictConfig, device: torch.device, kept: dict[str, Any]) -> dict[str, Any]:
    """Sample a point and return its row.

    kept: cache of evaluators by reference.
    """
    relay = build_relay(cfg.relay).to(device).eval()
    size = (relay.resolution, relay.resolution)
    key = f"{cfg.relay.reference}{cfg.reference}{size}"
    if key not in kept:
        evaluator = build_evaluator(cfg.metrics, sampling_options(cfg).reference, size)
        evaluator.prepare(device)
        kept[key] = evaluator
    evaluation: Evaluator = kept[key]
    evaluation.reset()
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(options.precision)
    seconds, timed = 0.0, 0
    with progress("sampling", options.count) as advance:
        stream = batches(relay, cfg, options.batch)
        while True:
            began = time.perf_counter()
            with torch.autocast(device.type, half, enabled=half is not None):
                made = next(stream, None)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if made is None:
                break
            images, positions = made
            if int(positions[0]) >= 2 * options.batch:  # CUDA graphs are captured by then
                seconds, timed = seconds + time.perf_counter() - began, timed + len(images)
            evaluation.update(images, positions)
            advance(len(images))
    evaluations, tflop = cost(relay)
    results = evaluation.compute()
    return {
        "images": options.count, "evaluations": evaluations, "tflop": f"{tflop:.4f}",
        "seconds": f"{seconds / timed:.5f}" if timed else "", "fid": f"{results['fid']:.3f}",
        "sfid": f"{results['sfid']:.3f}",
    }  # fmt: skip


def run(options: Options) -> None:
    """Print and write a row for each point and repeat."""
    for name in ("count", "repeats", "batch", "points"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1")
    todo = [(curve, overrides, repeat) for repeat in range(options.repeats) for curve, overrides in points(options)]
    configs = [settings(options, overrides, repeat) for _, overrides, repeat in todo]  # report mistakes before sampling
    path, rows = Path(options.output), []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["curve"], row["overrides"], row["repeat"], row["images"]) for row in rows}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_host(device)
    print(environment())
    kept: dict[str, Any] = {}
    for (curve, overrides, repeat), cfg in zip(todo, configs, strict=True):
        if (curve, overrides, str(repeat), str(options.count)) in done:
            continue
        row = {"curve": curve, "overrides": overrides, "repeat": repeat, "device": _name(device)}
        row |= measured(options, cfg, device, kept)
        rows.append(row)
        write_text(path, "\n".join(_lines(rows)) + "\n")
        print(
            f"{curve:18} {row['evaluations']:>8} evaluations {row['tflop']:>8} TFLOP {row['seconds']:>8} s an image  "
            f"FID {row['fid']:>8}  sFID {row['sfid']:>8}  {overrides}",
            flush=True,
        )


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    quoted = [{**row, "overrides": f'"{row["overrides"]}"'} for row in rows]
    return [",".join(COLUMNS), *(",".join(str(row[column]) for column in COLUMNS) for row in quoted)]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["repeats=3"], __doc__ or "", Options, run))
