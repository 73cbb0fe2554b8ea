"""Measure noise-level grids of samplers by FID: `python benchmarks/grids.py first=GRIDS last=GRIDS`.

GRIDS is steps/sigma_max/sigma_min/rho/s_noise for the multistep sampler, heun:steps/... for the second-order sampler of
the stage (2 steps - 1 evaluations). Commas separate alternatives of one value, and all combinations are measured, as in
last=heun:2,3/0.6,0.85/0.02/7/0.2. Several such products are joined by a plus sign.

first      grids of the first stage; real: enlarge `images`; noise: the relay has a single stage     (real)
last       grids of the last stage                               (2/0.6/0.02/7/0.2)
points     yaml file with `first` and `last` of each curve, in their place (benchmarks/evaluations.yaml is one)
relay      folder with relay.json or choice of conf/relay, of one or two stages     (emoji_classes)
images     folder or zip of images with classes, of the first stage's resolution or a multiple (demo/emoji-64.zip)
reference  what FID compares with                                (data/emoji-256.zip)
subset     of `images` and `reference`                           (train)
count      number of evenly spaced images of `images`            (all)
weights    Inception's                                           (those that are installed)
seed       the first; comparisons must use others than a search  (1000000)
batch      images at once                                        (256)
output     a row is added for each point; existing rows are kept, and an error if their weights have changed
                                                                 (outputs/grids.csv)

Samples one image for each of `images`, of its class. Prints at the end the best grid of each number of evaluations.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import Table, device_name, draw, score, tflop, weights_hash
from omegaconf import OmegaConf
from timing import environment
from torch import Tensor

from relay_diffusion.checkpoints.loading import load_relay
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import evenly_spaced
from relay_diffusion.diffusion.corruption import GainCorruption
from relay_diffusion.diffusion.pixels import to_float, to_uint8
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import FIDMetric, Inception, ReferenceSource, SFIDMetric
from relay_diffusion.metrics.evaluator import Evaluator
from relay_diffusion.models import DiffusionStage
from relay_diffusion.samplers import BlurringSampler, EDMSampler, MultistepSampler, Sampler
from relay_diffusion.utils.host import prepare_host

REAL, NOISE, HEUN = "real", "noise", "heun:"
KEY = ["relay", "first", "last", "reference", "subset", "seed", "images"]
COLUMNS = [*KEY, "evaluations", "tflop", "seconds", "fid", "sfid", "device"]


@dataclass
class Options:
    """The command line; see above."""

    first: str = REAL
    last: str = "2/0.6/0.02/7/0.2"
    points: str | None = None
    relay: str = "emoji_classes"
    images: str = "demo/emoji-64.zip"
    reference: str = "data/emoji-256.zip"
    subset: str = "train"
    count: int | None = None
    weights: str | None = None
    seed: int = 1_000_000
    batch: int = 256
    output: str = "outputs/grids.csv"


def grids(option: str, text: str) -> list[str]:
    """Every combination of the alternatives, each as text."""
    found = []
    for product in text.split("+"):
        kind = HEUN if product.startswith(HEUN) else ""
        parts = [part.split(",") for part in product.removeprefix(HEUN).split("/")]
        if len(parts) != 5:
            raise UserError(f"{option}={product}: must be steps/sigma_max/sigma_min/rho/s_noise")
        found += [kind + "/".join(values) for values in itertools.product(*parts)]
    return found


def combinations(first: str, last: str) -> list[tuple[str, str]]:
    """Every pair (grid of the first stage, grid of the last one)."""
    firsts = [first] if first in (REAL, NOISE) else grids("first", first)
    return list(itertools.product(firsts, grids("last", last)))


def curves(path: str, option: str = "points") -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Read the points of each curve from a yaml file.

    The result maps panels to curves to points.
    """
    if not Path(path).is_file():
        raise UserError(f"{option}={path}: no such file")
    try:
        panels = OmegaConf.to_container(OmegaConf.load(path))
        return {
            panel: {curve: combinations(str(grids["first"]), str(grids["last"])) for curve, grids in of_panel.items()}
            for panel, of_panel in panels.items()
        }
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{option}={path}: must hold panels, each with curves that have `first` and `last`") from None


def sampler(stage: DiffusionStage, option: str, grid: str) -> Sampler:
    """The sampler of one grid."""
    corruption: GainCorruption = stage.corruption
    try:
        steps, *values = grid.removeprefix(HEUN).split("/")
        levels, (sigma_max, sigma_min, rho, s_noise) = int(steps), map(float, values)
        if not grid.startswith(HEUN):
            return MultistepSampler(corruption, levels, sigma_min, sigma_max, rho, s_noise)
        if corruption.starts_from_noise:
            return EDMSampler(levels, sigma_min, sigma_max, rho, sde_scale=s_noise)
        return BlurringSampler(corruption, levels, sigma_min, sigma_max, rho, math.inf, s_noise)
    except ValueError as error:
        raise UserError(f"{option}={grid}: {error}") from None


class Start(NamedTuple):
    """Images that the last stage starts from (None: noise), and what they cost."""

    images: Tensor | None = None
    evaluations: str = ""
    tflop: float = 0.0
    seconds: float = 0.0


class Bench:
    """The stages, the small images and the evaluator, which all points share."""

    def __init__(self, options: Options, device: torch.device, points: Iterable[tuple[str, str]]) -> None:
        relay = load_relay(options.relay).to(device).eval()
        self.weights = weights_hash(relay.chain().values())
        *before, self.last = relay.chain().values()
        if len(before) > 1:
            raise UserError(f"relay={options.relay}: must have one or two stages")
        self.first = before[0] if before else None
        for first, last in points:  # report mistakes before sampling
            if (first == NOISE) != (self.first is None):
                wanted = f"first={NOISE}" if self.first is None else "grids or real"
                raise UserError(f"first={first}: relay={options.relay} needs {wanted}")
            if self.first is not None and first != REAL:
                sampler(self.first, "first", first)
            sampler(self.last, "last", last)
        if relay.text_dim:
            raise UserError(f"relay={options.relay}: takes text, which samples here have not; use a relay without text")
        size = self.last.size if self.first is None else self.first.size
        self.dataset = ImageDataset(options.images, size, subset=options.subset, option="images")
        every = len(self.dataset)
        self.chosen = evenly_spaced(min(options.count or every, every), every)
        self.labels = torch.tensor([self.dataset.labels[i] for i in self.chosen])
        self.seeds = range(options.seed, options.seed + len(self.chosen))
        self.batch, self.device = options.batch, device
        source = ReferenceSource(options.reference, "outputs/reference", self.last.size, options.subset, 0)
        self.evaluator = Evaluator(Inception(options.weights), source, {"fid": FIDMetric(), "sfid": SFIDMetric()})
        self.evaluator.prepare(device)

    def start(self, first: str) -> Start:
        """What the last stage starts from."""
        if self.first is None:
            return Start()
        if first == REAL:
            images, _ = self.dataset.batch(self.chosen)
            return Start(to_float(images).to(self.device))
        chosen = sampler(self.first, "first", first)
        images, seconds = draw(self.first, chosen, self.seeds, self.labels, None, self.batch)
        return Start(images.clamp(-1, 1), f"{chosen.evaluations}+", tflop(self.first, chosen), seconds)

    def measure(self, start: Start, last: str) -> dict[str, str]:
        """The columns from evaluations to device."""
        chosen = sampler(self.last, "last", last)
        images, seconds = draw(self.last, chosen, self.seeds, self.labels, start.images, self.batch)
        results = score(self.evaluator, to_uint8(images), self.batch)
        return {
            "evaluations": f"{start.evaluations}{chosen.evaluations}",
            "tflop": f"{start.tflop + tflop(self.last, chosen):.5g}",
            "seconds": f"{start.seconds + seconds:.6f}",
            "fid": f"{results['fid']:.3f}",
            "sfid": f"{results['sfid']:.3f}",
            "device": device_name(self.device),
        }


def best(rows: list[dict[str, str]], stage: str, other: str) -> list[str]:
    """A line for each choice of the other stage: the grids of lowest FID, one for each number of steps."""
    lines = []
    for fixed in dict.fromkeys(row[other] for row in rows):
        lowest: dict[str, dict[str, str]] = {}
        compared = [row for row in rows if row[other] == fixed]
        for row in compared:
            steps = row[stage].split("/")[0]
            if steps not in lowest or float(row["fid"]) < float(lowest[steps]["fid"]):
                lowest[steps] = row
        if len(lowest) < len(compared):
            lines.append(f"best for {other}={fixed}: {stage}={'+'.join(row[stage] for row in lowest.values())}")
    return lines


def run(options: Options) -> None:
    """Print and keep a row for each point."""
    for name in ("count", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1")
    if options.points is not None:
        points = [point for panel in curves(options.points).values() for curve in panel.values() for point in curve]
    else:
        points = combinations(options.first, options.last)
    table = Table(Path(options.output), KEY, COLUMNS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_host(device)
    bench = Bench(options, device, points)
    print(environment())
    compared = options.reference, options.subset, str(options.seed), str(len(bench.seeds))
    keys = {(first, last): (options.relay, first, last, *compared) for first, last in points}
    found = {point: table.find(key, bench.weights) for point, key in keys.items()}
    table.report(found.values())
    starts: dict[str, Start] = {}
    for (first, last), row in found.items():
        if row is None:
            began = time.perf_counter()
            if first not in starts:
                starts[first] = bench.start(first)
            row = table.add(keys[first, last], bench.weights, bench.measure(starts[first], last))
            found[first, last] = row
            print(
                f"first {first:24} last {last:24} {row['evaluations']:>6} evaluations {row['tflop']} TFLOP "
                f"{row['seconds']} s an image  FID {row['fid']:>7}  sFID {row['sfid']:>7}  "
                f"({time.perf_counter() - began:.1f} s)",
                flush=True,
            )
    of_points = [row for row in found.values() if row is not None]
    for line in best(of_points, "last", "first") + best(of_points, "first", "last"):
        print(line)


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["first=real"], __doc__ or "", Options, run))
