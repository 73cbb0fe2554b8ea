"""Measure a relay stage against interpolation on random crops of held-out images.

python benchmarks/enlarging.py [key=value ...]

stage      relay stage: directory of a run, .ckpt file or export   (demo/photos_256)
methods    bicubic, lanczos, and grids as in grids.py, joined by plus signs; consistent: before a grid ties block means
           to the input, as relay.consistency=true does             (bicubic+lanczos+consistent:1,2,3,5,9/0.2/0.02/7/0)
images     folder or zip of images of any size                     (data/photos.zip)
subset     a folder inside                                         (heldout)
count      number of crops, equally many of each image; FID needs more than 2,048   (5000)
weights    Inception's                                             (those that are installed)
seed       the first of the noise                                  (0)
batch      crops at once                                           (250)
output     a row is added for each method; existing rows are kept, and an error if the weights of `stage` have changed
                                                       (outputs/enlarging.csv)

The input is the block means of a crop, in 8 bits. FID and sFID compare the results with the crops themselves, as other
images would add the distance of their contents to every method. PSNR [dB] (of the mean squared error of all crops) and
SSIM compare each result with its crop. Agreement is the RMS difference of the block means of the result and the input,
in gray levels; that of the crops is 0.3, as the input is rounded.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from grids import grids, sampler
from measuring import Table, device_name, draw, score, tflop, weights_hash
from PIL import Image
from timing import environment
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import image_tensor
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.diffusion.pixels import to_float, to_uint8
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import FIDMetric, FrechetDistance, Inception, Reference, SFIDMetric
from relay_diffusion.metrics.evaluator import Evaluator
from relay_diffusion.models import DiffusionStage
from relay_diffusion.samplers import Sampler
from relay_diffusion.sampling.agreement import difference
from relay_diffusion.utils.host import prepare_host
from relay_diffusion.utils.parallel import map_in_order

CONSISTENT = "consistent:"
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
KEY = ["stage", "method", "images", "subset", "seed", "count"]
COLUMNS = [*KEY, "evaluations", "tflop", "seconds", "fid", "sfid", "psnr", "ssim", "agreement", "device"]
GRAY_LEVELS = 255.0


@dataclass
class Options:
    """The command line; see above."""

    stage: str = "demo/photos_256"
    methods: str = "bicubic+lanczos+consistent:1,2,3,5,9/0.2/0.02/7/0"
    images: str = "data/photos.zip"
    subset: str = "heldout"
    count: int = 5000
    weights: str | None = None
    seed: int = 0
    batch: int = 250
    output: str = "outputs/enlarging.csv"


def methods_of(text: str) -> list[str]:
    """Every method, once."""
    methods: list[str] = []
    for part in text.split("+"):
        if part in INTERPOLATIONS:
            methods.append(part)
        else:
            prefix = CONSISTENT if part.startswith(CONSISTENT) else ""
            methods += [prefix + grid for grid in grids("methods", part.removeprefix(prefix))]
    return list(dict.fromkeys(methods))


def sampler_of(stage: DiffusionStage, method: str) -> Sampler:
    """The sampler of a method that is a grid."""
    return sampler(stage, "methods", method.removeprefix(CONSISTENT))


def load_enlarging_stage(path: str, device: torch.device) -> DiffusionStage:
    """Load a stage that starts from the images to enlarge."""
    stage = load_stage(path).to(device).eval()
    if stage.corruption.starts_from_noise:
        raise UserError(f"stage={path}: starts from noise; give a relay stage")
    return stage


def inputs(crops: Tensor, block: int) -> Tensor:
    """Reduce crops to the images to enlarge, uint8 [B,C,h,w]."""
    return (block_mean(crops.float(), block) + 0.5).to(torch.uint8)


def interpolated(small: Tensor, block: int, method: str) -> tuple[Tensor, float]:
    """Enlarge images, uint8 [N,C,h,w], one by one.

    Returns uint8 [N,C,H,W] and the median of the seconds per image.
    """
    results, times = [], []
    for pixels in small.permute(0, 2, 3, 1).cpu().numpy():
        began = time.perf_counter()
        image = Image.fromarray(np.ascontiguousarray(pixels))
        large = image.resize((image.width * block, image.height * block), INTERPOLATIONS[method])
        times.append(time.perf_counter() - began)
        results.append(image_tensor(large))
    return torch.stack(results).to(small.device), statistics.median(times)


def enlarged(stage: DiffusionStage, small: Tensor, method: str, seed: int, batch: int) -> tuple[Tensor, float]:
    """Enlarge images, uint8 [N,C,h,w], by a method.

    Returns uint8 [N,C,H,W] and the seconds per image.
    """
    if method in INTERPOLATIONS:
        return interpolated(small, stage.corruption.block, method)
    seeds, labels = range(seed, seed + len(small)), torch.full((len(small),), NO_CLASS)
    consistency = method.startswith(CONSISTENT)
    images, seconds = draw(
        stage, sampler_of(stage, method), seeds, labels, to_float(small), batch, consistency=consistency
    )
    return to_uint8(images), seconds


class Bench:
    """The stage, the crops and the evaluators, which all methods share."""

    def __init__(self, options: Options, device: torch.device, methods: list[str]) -> None:
        self.stage, self.options, self.device = load_enlarging_stage(options.stage, device), options, device
        for method in methods:  # report mistakes before sampling
            if method not in INTERPOLATIONS:
                sampler_of(self.stage, method)
        images, size = options.images, self.stage.size
        dataset = ImageDataset(
            images, size, options.subset, labels=False, cache=True, random_crops=options.count, option="images"
        )
        dataset.load()
        chosen = range(options.count)  # the first crop of every image, then the second ones
        self.crops = torch.stack([image for image, _ in map_in_order(dataset.__getitem__, chosen)]).to(device)
        self.small = inputs(self.crops, self.stage.corruption.block)
        inception = Inception(options.weights).to(device)
        metrics = {"fid": FIDMetric(), "sfid": SFIDMetric()}
        self.evaluator = Evaluator(inception, self._reference(inception), metrics).to(device)
        self.psnr = PeakSignalNoiseRatio(data_range=GRAY_LEVELS).to(device)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=GRAY_LEVELS).to(device)

    def _reference(self, inception: Inception) -> Reference:
        """Statistics of the features of the crops."""
        distances: list[FrechetDistance] = []
        for batch in self.crops.split(self.options.batch):
            features = inception(batch)
            both = features.pool, features.spatial.flatten(1)
            distances = distances or [FrechetDistance(rows.shape[1]).to(self.device) for rows in both]
            for distance, rows in zip(distances, both, strict=True):
                distance.update(rows, real=True)
        return Reference(*(distance.statistics(real=True) for distance in distances))

    def measure(self, method: str) -> dict[str, str]:
        """The columns from evaluations to device."""
        options, stage = self.options, self.stage
        results, seconds = enlarged(stage, self.small, method, options.seed, options.batch)
        distances = score(self.evaluator, results, options.batch)
        self.psnr.reset()
        self.ssim.reset()
        squares = 0.0
        for result, crop, small in zip(
            *(x.split(options.batch) for x in (results, self.crops, self.small)), strict=True
        ):
            self.psnr.update(result.float(), crop.float())
            self.ssim.update(result.float(), crop.float())
            squares += float(difference(result, small).square().sum(dtype=torch.float64))
        chosen = None if method in INTERPOLATIONS else sampler_of(stage, method)
        return {
            "evaluations": str(chosen.evaluations if chosen else 0),
            "tflop": f"{tflop(stage, chosen) if chosen else 0:.5g}",
            "seconds": f"{seconds:.6f}",
            "fid": f"{distances['fid']:.3f}",
            "sfid": f"{distances['sfid']:.3f}",
            "psnr": f"{float(self.psnr.compute()):.3f}",
            "ssim": f"{float(self.ssim.compute()):.4f}",
            "agreement": f"{(squares / self.small.numel()) ** 0.5:.3f}",
            "device": device_name(self.device if chosen else torch.device("cpu")),
        }


def run(options: Options) -> None:
    """Print and keep a row for each method."""
    for name in ("count", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1")
    methods, table = methods_of(options.methods), Table(Path(options.output), KEY, COLUMNS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_host(device)
    bench = Bench(options, device, methods)
    print(environment())
    weights = dict.fromkeys(methods, weights_hash([bench.stage])) | dict.fromkeys(INTERPOLATIONS, "")
    compared = options.images, options.subset, str(options.seed), str(options.count)
    keys = {method: (options.stage, method, *compared) for method in methods}
    found = {method: table.find(key, weights[method]) for method, key in keys.items()}
    table.report(found.values())
    for method in (method for method, row in found.items() if row is None):
        row = table.add(keys[method], weights[method], bench.measure(method))
        shown = ("evaluations", "seconds", "fid", "sfid", "psnr", "ssim", "agreement")
        print(f"{method:28}", *(f"{name} {row[name]:>8}" for name in shown), flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or [f"stage={Options.stage}"], __doc__ or "", Options, run))
