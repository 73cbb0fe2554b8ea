"""Time the metrics without the Inception features.

python benchmarks/metrics.py [key=value ...]

Features of generated and reference images are synthetic. The ratios are to plain implementations on the same device:
the Frechet distance by the eigenvalues of S1 S2, precision and recall by blocks of torch.cdist in float64, KID by
blocks of 1,000 rows of its kernel. The results are compared.

  device      auto | cpu | cuda                        (auto)
  metric      frechet | precision_recall | kid         (all)
  images      number of generated images               (50000 on a GPU, 4000 on a CPU)
  reference   number of reference images of precision, recall and KID   (10000, 2000)
  repeats     timed runs                               (3)
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import environment, line, pick_device, seconds
from torch import Tensor

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.errors import UserError
from relay_diffusion.metrics.frechet import FrechetDistance, frechet_distance
from relay_diffusion.metrics.kid import kernel_distance
from relay_diffusion.metrics.precision_recall import precision_recall

BATCH = 256  # images per update
SIZES = {"FID": 2048, "sFID": 2023}


@dataclass
class Options:
    """Options of this command; see above."""

    device: str = "auto"
    metric: str = "frechet,precision_recall,kid"
    images: int = 0
    reference: int = 0
    repeats: int = 3


def features(count: int, size: int, device: torch.device, shift: float = 0.0) -> Tensor:
    """Draw non-negative, correlated features: float32 [count, size]."""
    generator = torch.Generator(device).manual_seed(count + size)
    causes = torch.randn(count, 64, generator=generator, device=device)
    mixing = torch.randn(64, size, generator=generator, device=device) / 8
    own = torch.randn(count, size, generator=generator, device=device)
    return (causes @ mixing + 0.3 * own + shift).relu()


def compare(name: str, work: Callable[[], object], plain: Callable[[], object], images: int, repeats: int) -> None:
    """Print one row for each implementation."""
    slow = seconds(plain, repeats, warm_up=1)
    print(line(f"{name}, plain", slow, images), flush=True)
    times = seconds(work, repeats, warm_up=1)
    print(line(name, times, images, images / statistics.median(slow)), flush=True)


def frechet(fake: int, reference: int, device: torch.device, repeats: int) -> None:
    """Time the sums over all generated images, then the distance."""
    for name, size in SIZES.items():
        batches = features(fake, size, device, shift=0.05).split(BATCH)
        metric = FrechetDistance(size).to(device)
        for batch in features(max(reference, 2 * size), size, device).split(BATCH):
            metric.update(batch, real=True)

        def update(metric: FrechetDistance = metric, batches: tuple[Tensor, ...] = batches) -> None:
            for batch in batches:
                metric.update(batch, real=False)

        print(line(f"{name}: sums, batches of {BATCH}", seconds(update, repeats, warm_up=1), fake), flush=True)
        real, generated = metric.statistics(real=True), metric.statistics(real=False)
        statistic = (*real[:2], *generated[:2])

        def plain(statistic: tuple[Tensor, ...] = statistic) -> Tensor:
            mean1, covariance1, mean2, covariance2 = statistic
            roots = torch.linalg.eigvals(covariance1 @ covariance2).real.clamp(min=0).sqrt()
            return (mean1 - mean2).square().sum() + (covariance1 + covariance2).trace() - 2 * roots.sum()

        def ours(statistic: tuple[Tensor, ...] = statistic) -> Tensor:
            return frechet_distance(*statistic)

        torch.testing.assert_close(ours(), plain(), rtol=1e-6, atol=1e-6)
        compare(f"{name}: distance, {size} features", ours, plain, fake, repeats)


def precision_and_recall(fake: int, reference: int, device: torch.device, repeats: int) -> None:
    """Time precision and recall with the third neighbor."""
    real, generated = features(reference, 2048, device), features(fake, 2048, device)

    def plain() -> tuple[Tensor, Tensor]:
        sets = real.double(), generated.double()
        radii = [torch.cat([torch.cdist(p, s).kthvalue(4).values for p in s.split(500)]) for s in sets]
        shares = []
        for points, centers, radius in ((sets[1], sets[0], radii[0]), (sets[0], sets[1], radii[1])):
            found = [(torch.cdist(part, centers) <= radius).any(1) for part in points.split(500)]
            shares.append(torch.cat(found).double().mean())
        return shares[0], shares[1]

    torch.testing.assert_close(tuple(precision_recall(real, generated, 3)), plain(), rtol=0, atol=1e-3)
    name = f"precision, recall: {fake} x {reference}"
    compare(name, lambda: precision_recall(real, generated, 3), plain, fake, repeats)


def kid(fake: int, reference: int, device: torch.device, repeats: int) -> None:
    """Time the kernel distance of all pairs."""
    real, generated = features(reference, 2048, device), features(fake, 2048, device)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        same, total = a is b, torch.zeros((), dtype=torch.float64, device=device)
        for part in a.double().split(1000):
            total += (part @ b.double().T / 2048 + 1).pow(3).sum()
        if same:
            total -= (a.double().square().mean(1) + 1).pow(3).sum()
        return total / (len(a) * (len(b) - same))

    def plain() -> Tensor:
        return mean(real, real) + mean(generated, generated) - 2 * mean(real, generated)

    torch.testing.assert_close(kernel_distance(real, generated), plain(), rtol=1e-6, atol=1e-9)
    compare(f"KID: {fake} x {reference}", lambda: kernel_distance(real, generated), plain, fake, repeats)


METRICS = {"frechet": frechet, "precision_recall": precision_and_recall, "kid": kid}


def run(options: Options) -> None:
    """Print the rows of each metric."""
    device = pick_device(options.device)
    fake, reference = (50_000, 10_000) if device.type == "cuda" else (4000, 2000)
    print(environment())
    for metric in options.metric.split(","):
        if metric not in METRICS:
            raise UserError(f"metric={metric}: use {', '.join(METRICS)}")
        METRICS[metric](options.images or fake, options.reference or reference, device, options.repeats)


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["repeats=3"], __doc__ or "", Options, run))
