"""Measure sample quality against sampling cost for many settings.

python benchmarks/comparison.py [key=value ...]

curves  yaml file with the points of each curve by name; a point is a text of overrides of sample.py, and commas between
        values make several points                    (benchmarks/emoji.yaml)
output  CSV file to which a row is added for each point and repeat; existing rows are kept, and an error if their
        weights have changed                          (outputs/comparison/points.csv)
only    comma-separated names of curves               (all)
points  number of points of each curve, from the first (all)
count   images per point, with class frequencies of the reference   (3121)
repeats number of sets of each point: set 0 has the seeds from 0, set 1 the next ones, and so on (3)
batch   images per batch                              (256)
precision  precision of the networks                  (bf16-mixed)
weights Inception weights                             (those that are installed)

Stages before the last one sample once for points with the same settings of them; their time counts in each point.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from measuring import Table, autocast_dtype, device_name, draw, score, tflop, weights_hash
from omegaconf import DictConfig, OmegaConf
from timing import environment
from torch import Tensor

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.config import compose
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluator
from relay_diffusion.models import DiffusionStage, Relay
from relay_diffusion.sampling.options import sampling_options
from relay_diffusion.sampling.plan import Plan
from relay_diffusion.sampling.run import build_evaluator, build_relay, make_plan
from relay_diffusion.utils.host import prepare_host
from relay_diffusion.utils.resolution import Size

KEY = ["curve", "overrides", "repeat", "images"]
COLUMNS = [*KEY, "evaluations", "tflop", "seconds", "fid", "sfid", "device"]


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
    found = {name: [point for overrides in curves[name] for point in expanded(str(overrides))] for name in chosen}
    return [(name, overrides) for name in chosen for overrides in found[name][: options.points]]


def expanded(overrides: str) -> list[str]:
    """List the points of overrides.

    One for each combination of values with commas between them.
    """
    parts = [
        [f"{part.get_key_element()}={value}" for value in part.sweep_string_iterator()]
        if part.is_sweep_override()
        else [str(part.input_line)]
        for part in OverridesParser.create().parse_overrides(overrides.split())
    ]
    return [" ".join(combination) for combination in itertools.product(*parts)]


def settings(options: Options, overrides: str, repeat: int) -> DictConfig:
    """Compose the config of sample.py for a point."""
    first = repeat * options.count
    given = ["mode=evaluate", "class=reference", f"seeds={first}-{first + options.count - 1}", *overrides.split()]
    if options.weights is not None:
        given.append(f"metrics.evaluator.inception.weights={options.weights}")
    cfg = compose("sample", given)
    validate_sampling(cfg)
    return cfg


class Weights:
    """Hashes of the weights of relays, computed once for the same checkpoints."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, ...], str] = {}

    def __call__(self, cfg: DictConfig) -> str:
        """Hash the weights of the relay of a point."""
        paths = tuple(f"{stage.path} {stage.weights}" for stage in cfg.relay.stages.values())
        if paths not in self.known:
            self.known[paths] = weights_hash(build_relay(cfg.relay).chain().values())
        return self.known[paths]


class Bench:
    """Stages, evaluators and small images that points share."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.precision = autocast_dtype(options.precision)
        self.stages: dict[str, DiffusionStage] = {}
        self.evaluators: dict[str, Evaluator] = {}
        self.settings: object = None  # of the latest small images
        self.small: tuple[Tensor | None, float] = None, 0.0

    def evaluator(self, cfg: DictConfig, size: Size) -> Evaluator:
        """Return the evaluator of a point, prepared."""
        key = f"{cfg.relay.reference}{cfg.reference}{size}"
        if key not in self.evaluators:
            evaluator = build_evaluator(cfg.metrics, sampling_options(cfg).reference, size)
            evaluator.prepare(self.device)
            self.evaluators[key] = evaluator
        return self.evaluators[key]

    def draw(
        self, relay: Relay, name: str, cfg: DictConfig, plan: Plan, previous: Tensor | None
    ) -> tuple[Tensor, float]:
        """Sample the images of a stage and time it.

        An earlier stage that differs only in its sampler is used again, because it has CUDA graphs.
        """
        settings = OmegaConf.to_container(cfg.relay.stages[name], resolve=True)
        settings["sampler"] = settings["changes"]["sampler"] = None
        stage = self.stages.setdefault(str(settings), relay.chain()[name]).to(self.device).eval()
        labels, consistency = torch.tensor(plan.labels), relay.consistency and previous is not None
        batch, sampler, size = self.options.batch, relay.samplers[name], relay.sizes[name]
        return draw(stage, sampler, plan.seeds, labels, previous, batch, self.precision, consistency, size)

    def before_last(self, relay: Relay, cfg: DictConfig, plan: Plan) -> tuple[Tensor | None, float]:
        """Return the images of the stage before the last.

        Also the seconds per image up to there. Those of the point before, if all that they depend on is the same.
        """
        names = list(relay.chain())[:-1]
        tied = relay.consistency and len(names) > 1  # the first stage has no input
        stages = [str(cfg.relay.stages[name]) for name in names]
        settings = [plan, relay.sizes, cfg.relay.hand_over_sigma, tied, *stages]
        if settings != self.settings:
            images, spent = None, 0.0
            for name in names:
                images, seconds = self.draw(relay, name, cfg, plan, images)
                images, spent = images.clamp(-1, 1), spent + seconds
            self.settings, self.small = settings, (images, spent)
        return self.small

    def measure(self, cfg: DictConfig) -> dict[str, str]:
        """Sample a point; return the columns from evaluations to device."""
        relay = build_relay(cfg.relay)
        evaluator = self.evaluator(cfg, relay.size)  # report missing weights before sampling
        plan = make_plan(sampling_options(cfg), relay)
        small, spent = self.before_last(relay, cfg, plan)
        images, seconds = self.draw(relay, list(relay.chain())[-1], cfg, plan, small)
        finished = torch.cat([relay.finish(part) for part in images.split(self.options.batch)])
        results = score(evaluator, finished, self.options.batch)
        operations = sum(tflop(stage, relay.samplers[name], relay.sizes[name]) for name, stage in relay.chain().items())
        return {
            "evaluations": "+".join(str(sampler.evaluations) for sampler in relay.samplers.values()),
            "tflop": f"{operations:.5g}",
            "seconds": f"{spent + seconds:.6f}",
            "fid": f"{results['fid']:.3f}",
            "sfid": f"{results['sfid']:.3f}",
            "device": device_name(self.device),
        }


def run(options: Options) -> None:
    """Print and write a row for each point and repeat."""
    for name in ("count", "repeats", "batch", "points"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1")
    todo = [(curve, overrides, repeat) for repeat in range(options.repeats) for curve, overrides in points(options)]
    configs = [settings(options, overrides, repeat) for _, overrides, repeat in todo]  # report mistakes before sampling
    table = Table(Path(options.output), KEY, COLUMNS)
    keys = [(curve, overrides, str(repeat), str(options.count)) for curve, overrides, repeat in todo]
    weights = list(map(Weights(), configs))
    found = list(map(table.find, keys, weights))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_host(device)
    print(environment())
    table.report(found)
    bench = Bench(options, device)
    for key, cfg, hashed, row in zip(keys, configs, weights, found, strict=True):
        if row is not None:
            continue
        began = time.perf_counter()
        row = table.add(key, hashed, bench.measure(cfg))
        took = time.perf_counter() - began
        print(
            f"{row['curve']:18} set {row['repeat']} {row['evaluations']:>8} evaluations {row['tflop']:>8} TFLOP "
            f"{row['seconds']:>9} s an image  FID {row['fid']:>8}  sFID {row['sfid']:>8}  ({took:.1f} s)  "
            f"{row['overrides']}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["repeats=3"], __doc__ or "", Options, run))
