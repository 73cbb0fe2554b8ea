"""Search noise-level grids of the multistep sampler by FID: `python benchmarks/grids.py first=GRIDS last=GRIDS`.

GRIDS is steps/sigma_max/sigma_min/rho/s_noise; commas separate alternatives of one value, and all combinations are
measured, e.g. last=2/0.6,0.85/0.02/7/0,0.2. Several such products are joined by a plus sign.

first      grids of the first stage, or real: enlarge `images`    (real)
last       grids of the last stage                               (2/0.6/0.02/7/0.2)
relay      folder with relay.json, of two stages                 (demo/emoji)
images     folder or zip of small images with classes            (demo/emoji-64.zip)
reference  what FID compares with                                (data/emoji-256.zip)
subset     of `images` and `reference`                           (train)
weights    Inception's                                           (those that are installed)
seed       the first; comparisons must use others                (1000000)
batch      images at once                                        (256)
output     a row is added for each point; existing rows are kept (outputs/grids.csv)

One image for each of `images`, of its class.
"""

from __future__ import annotations

import csv
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import environment
from torch import Tensor

from relay_diffusion.checkpoints.loading import load_relay
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import FIDMetric, Inception, ReferenceSource, SFIDMetric
from relay_diffusion.metrics.evaluator import Evaluator
from relay_diffusion.models import DiffusionStage
from relay_diffusion.samplers import MultistepSampler
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.host import prepare_host

REAL = "real"


@dataclass
class Options:
    """The command line; see above."""

    first: str = REAL
    last: str = "2/0.6/0.02/7/0.2"
    relay: str = "demo/emoji"
    images: str = "demo/emoji-64.zip"
    reference: str = "data/emoji-256.zip"
    subset: str = "train"
    weights: str | None = None
    seed: int = 1_000_000
    batch: int = 256
    output: str = "outputs/grids.csv"


def grids(option: str, text: str) -> list[str]:
    """Every combination of the alternatives, each as text."""
    found = []
    for product in text.split("+"):
        parts = [part.split(",") for part in product.split("/")]
        if len(parts) != 5:
            raise UserError(f"{option}={product}: must be steps/sigma_max/sigma_min/rho/s_noise")
        found += ["/".join(values) for values in itertools.product(*parts)]
    return found


def sampler(stage: DiffusionStage, option: str, grid: str) -> MultistepSampler:
    """The sampler of one grid."""
    try:
        steps, sigma_max, sigma_min, rho, s_noise = (float(part) for part in grid.split("/"))
        return MultistepSampler(stage.corruption, int(steps), sigma_min, sigma_max, rho, s_noise)
    except ValueError as error:
        raise UserError(f"{option}={grid}: {error}") from None


class Search:
    """The stages, the small images and the evaluator, which all points share."""

    def __init__(self, options: Options, device: torch.device, firsts: list[str], lasts: list[str]) -> None:
        relay = load_relay(options.relay).to(device).eval()
        self.first, self.last = relay.chain().values()
        for stage, option, chosen in ((self.first, "first", firsts), (self.last, "last", lasts)):
            for grid in chosen:
                if grid != REAL:
                    sampler(stage, option, grid)  # report mistakes before sampling
        dataset = ImageDataset(options.images, self.first.resolution, subset=options.subset)
        pairs = dataset.__getitems__(list(range(len(dataset))))
        self.real = torch.stack([image for image, _ in pairs])
        self.labels = torch.tensor([label for _, label in pairs])
        self.seeds = range(options.seed, options.seed + len(pairs))
        self.batch, self.device = options.batch, device
        source = ReferenceSource(options.reference, "outputs/reference", [self.last.resolution] * 2, options.subset, 0)
        inception = Inception(options.weights)
        self.evaluator = Evaluator(inception, source, {"fid": FIDMetric(), "sfid": SFIDMetric()})
        self.evaluator.prepare(device)

    def draw(self, stage: DiffusionStage, sampler: MultistepSampler, previous: Tensor | None) -> Tensor:
        """All images of a stage, float on the device."""
        stage.sampler = sampler
        side, parts = stage.resolution, []
        for first in range(0, len(self.seeds), self.batch):
            seeds = self.seeds[first : first + self.batch]
            shape = (len(seeds), stage.image_channels, side, side)
            small = None if previous is None else previous[first : first + self.batch].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                parts.append(stage.sample(shape, seeds, self.labels[first : first + self.batch], small))
        return torch.cat(parts)

    def measure(self, images: Tensor) -> tuple[float, float]:
        """FID and sFID."""
        self.evaluator.reset()
        positions = torch.arange(len(images))
        for part, places in zip(images.split(self.batch), positions.split(self.batch), strict=True):
            self.evaluator.update(to_uint8(part), places)
        numbers = self.evaluator.compute()
        return float(numbers["fid"]), float(numbers["sfid"])


def run(options: Options) -> None:
    """Print and keep a row for each point."""
    firsts = [REAL] if options.first == REAL else grids("first", options.first)
    lasts = grids("last", options.last)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_host(device)
    search = Search(options, device, firsts, lasts)
    print(environment())
    path = Path(options.output)
    text = path.read_text() if path.exists() else "first,last,seed,fid,sfid,seconds\n"
    done = {(row["first"], row["last"], row["seed"]) for row in csv.DictReader(text.splitlines())}
    for first in firsts:
        todo = [last for last in lasts if (first, last, str(options.seed)) not in done]
        if not todo:
            continue
        began = time.perf_counter()
        small = search.real
        if first != REAL:
            small = search.draw(search.first, sampler(search.first, "first", first), None).clamp(-1, 1)
        for last in todo:
            fid, sfid = search.measure(search.draw(search.last, sampler(search.last, "last", last), small))
            seconds = time.perf_counter() - began
            print(f"first {first:22} last {last:22} FID {fid:7.3f}  sFID {sfid:7.3f}  {seconds:5.1f} s", flush=True)
            text += f"{first},{last},{options.seed},{fid:.3f},{sfid:.3f},{seconds:.1f}\n"
            write_text(path, text)
            began = time.perf_counter()


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["first=real"], __doc__ or "", Options, run))
