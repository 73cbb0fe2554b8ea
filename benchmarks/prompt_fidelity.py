"""Measure how well samples show the emoji that their prompts name.

python benchmarks/prompt_fidelity.py [key=value ...]

data        zip of scripts/make_emoji_text.py               (data/emoji-text-64.zip)
subset      images whose captions are the prompts: train, composition or heldout   (composition)
relay       relay to sample, a choice of conf/relay; "": measure real images only  (emoji)
overrides   overrides of sample.py for the relay and the metrics, with spaces between them   ("")
stage       stage whose guidance scale changes              (base)
guidance    guidance scales, with commas between them       (1,2,4)
caption     which caption of an image is its prompt, from 0; the second one names emoji and style  (1)
count       prompts per style, evenly spaced; 0: all        (0)
gallery     real images per style to search; 0: all. Those of the prompts are always among them  (0)
resolution  pixels of the images without a relay            (64)
distances   also compute FID and sFID                       (true)
batch       images per batch                                (64)
precision   precision of the networks                       (bf16-mixed)
output      CSV file to which rows are added; an error if it has rows of other weights  (outputs/prompt_fidelity.csv)

A query is compared with the real images of the style in its prompt, of all subsets. top1, top5 and top10 are the
percentages of queries for which the image of the prompt is among the nearest 1, 5 and 10. The similarity is the cosine
of the pool features of Inception. An image with the same caption counts as the image of the prompt, and so does one at
the same distance. Rows, for each style:

samples      generated images, for each guidance scale
other styles real images of the same emoji in the other styles: what an image of the right content reaches
targets      the real images of the prompts: 100 %, and the FID of as many real images
chance       images in random order

FID and sFID compare with the real images of the style in the subset train. They are high for few images: compare with
the row of the targets.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measuring import Table, autocast_dtype, device_name, score, weights_hash
from omegaconf import DictConfig
from timing import environment
from torch import Tensor

from relay_diffusion.cli.arguments import positive_numbers, run_tool
from relay_diffusion.config import compose
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import evenly_spaced
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluator
from relay_diffusion.metrics.neighbours import squared_distances
from relay_diffusion.models import Relay
from relay_diffusion.sampling.options import ReferenceOptions
from relay_diffusion.sampling.run import build_evaluator, build_relay
from relay_diffusion.utils.host import prepare_host
from relay_diffusion.utils.progress import progress

NEAREST = (1, 5, 10)
TOP = [f"top{count}" for count in NEAREST]
KEY = ["queries", "relay", "guidance", "subset", "style", "count"]
COLUMNS = [*KEY, *TOP, "fid", "sfid", "device"]


@dataclass
class Options:
    """Options of this command; see above."""

    data: str = "data/emoji-text-64.zip"
    subset: str = "composition"
    relay: str = "emoji"
    overrides: str = ""
    stage: str = "base"
    guidance: str = "1,2,4"
    caption: int = 1
    count: int = 0
    gallery: int = 0
    resolution: int = 64
    distances: bool = True
    batch: int = 64
    precision: str = "bf16-mixed"
    output: str = "outputs/prompt_fidelity.csv"


class Emoji(NamedTuple):
    """A real image: position in the data set, place, and the caption that is its prompt."""

    position: int
    subset: str
    style: str
    code_points: str
    prompt: str


def list_emoji(dataset: ImageDataset, caption: int) -> list[Emoji]:
    """List the images of a zip. Raises UserError for another layout, or an image without captions."""
    found = []
    for position, (name, captions) in enumerate(zip(dataset.names, dataset.captions, strict=True)):
        parts = name.removesuffix(".png").split("/")
        if len(parts) != 3 or not captions:
            raise UserError(f"data={dataset.path}: {name!r} must be SUBSET/STYLE/CODE_POINTS.png with captions")
        found.append(Emoji(position, *parts, captions[min(caption, len(captions) - 1)]))
    return found


def target_ranks(queries: Tensor, gallery: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of each query's nearest target in a gallery, from 1.

    queries [Q,D], gallery [P,D], targets bool [Q,P]: at least one for each. Images as near as the target do not count.
    """
    squares = squared_distances(F.normalize(queries.double()), F.normalize(gallery.double()))  # 2 - 2 cosine
    nearest = squares.masked_fill(~targets, torch.inf).amin(1, keepdim=True)
    return 1 + (squares < nearest - 1e-12).sum(1)  # equal images may differ in the last digits


def chance(gallery: int, targets: Sequence[int]) -> list[float]:
    """Return the percentage of queries with a target among k random images of a gallery, for k in NEAREST."""
    drawn = [min(k, gallery) for k in NEAREST]
    missed = [[math.comb(gallery - own, k) / math.comb(gallery, k) for own in targets] for k in drawn]
    return [100 * (1 - sum(shares) / len(shares)) for shares in missed]


class Bench:
    """Real images, their features, and evaluators by style."""

    def __init__(self, options: Options, cfg: DictConfig, relay: Relay | None, device: torch.device) -> None:
        size = options.resolution if relay is None else relay.resolution
        self.options, self.device, self.relay = options, device, relay
        self.dataset = ImageDataset(options.data, size, labels=False, option="data")
        emoji = list_emoji(self.dataset, options.caption)
        if not any(one.subset == options.subset for one in emoji):
            raise UserError(f"subset={options.subset}: use {', '.join(sorted({one.subset for one in emoji}))}")
        self.styles = sorted({one.style for one in emoji})
        self.prompts, self.gallery = dict[str, list[Emoji]](), dict[str, list[Emoji]]()
        for style in self.styles:
            own = [one for one in emoji if one.style == style]
            asked = [one for one in own if one.subset == options.subset]
            self.prompts[style] = [
                asked[k] for k in evenly_spaced(min(options.count or len(asked), len(asked)), len(asked))
            ]
            others = [one for one in own if one not in set(self.prompts[style])]
            room = min(max(0, (options.gallery or len(own)) - len(self.prompts[style])), len(others))
            self.gallery[style] = self.prompts[style] + [others[k] for k in evenly_spaced(room, len(others))]
        self.by_code_points = defaultdict[str, list[Emoji]](list)
        for one in emoji:
            self.by_code_points[one.code_points].append(one)
        self.evaluators: dict[str, Evaluator] = {
            style: build_evaluator(
                cfg.metrics, ReferenceOptions(options.data, f"train/{style}", "data"), self.dataset.size
            )
            for style in self.styles
        }
        self._features: dict[int, Tensor] = {}

    def prepare(self) -> None:
        """Compute the features of all real images that are compared."""
        for evaluator in self.evaluators.values():
            if self.options.distances:
                evaluator.prepare(self.device)
            evaluator.inception.to(self.device)
        used = {one.position for style in self.styles for one in self.gallery[style]}
        used |= {one.position for style in self.styles for own in self.prompts[style] for one in self.others(own)}
        positions = sorted(used)
        with progress("features", len(positions)) as advance:
            for start in range(0, len(positions), self.options.batch):
                part = positions[start : start + self.options.batch]
                self._features |= dict(zip(part, self.features(self.dataset.batch(part)[0]), strict=True))
                advance(len(part))

    def features(self, images: Tensor) -> Tensor:
        """Return the pool features [N,D] of uint8 images."""
        inception = next(iter(self.evaluators.values())).inception
        return torch.cat([inception(part.to(self.device)).pool for part in images.split(self.options.batch)])

    def others(self, emoji: Emoji) -> list[Emoji]:
        """List the images of an emoji in other styles."""
        return [one for one in self.by_code_points[emoji.code_points] if one.style != emoji.style]

    def top(self, style: str, queries: Tensor, asked: Sequence[Emoji]) -> list[float]:
        """Return the percentages of queries with a target among the nearest. queries: features [Q,D]."""
        gallery = torch.stack([self._features[one.position] for one in self.gallery[style]])
        ranks = target_ranks(queries, gallery, self.targets(style, asked).to(queries.device))
        return [100 * float((ranks <= count).double().mean()) for count in NEAREST]

    def targets(self, style: str, asked: Sequence[Emoji]) -> Tensor:
        """Return which images of the gallery have the prompts: bool [Q,P]."""
        return torch.tensor([[one.prompt == own.prompt for one in self.gallery[style]] for own in asked])

    def distances(self, style: str, images: Tensor) -> dict[str, str]:
        """Return FID and sFID of uint8 images, unless they are switched off."""
        if not self.options.distances:
            return {}
        results = score(self.evaluators[style], images, self.options.batch)
        return {name: f"{results[name]:.3f}" for name in ("fid", "sfid") if name in results}

    def real_rows(self, style: str) -> list[dict[str, Any]]:
        """Return the rows that need no model."""
        asked = self.prompts[style]
        pairs = [(own, one) for own in asked for one in self.others(own)]
        images = self.dataset.batch([own.position for own in asked])[0].to(self.device)
        rows = []
        if pairs:
            queries = torch.stack([self._features[one.position] for _, one in pairs])
            top = self.top(style, queries, [own for own, _ in pairs])
            rows.append({"queries": "other styles", "count": len(pairs)} | rounded(top))
        queries = torch.stack([self._features[own.position] for own in asked])
        rows.append(
            {"queries": "targets", "count": len(asked)}
            | rounded(self.top(style, queries, asked))
            | self.distances(style, images)
        )
        own = self.targets(style, asked).sum(1).tolist()
        return [*rows, {"queries": "chance", "count": len(asked)} | rounded(chance(len(self.gallery[style]), own))]

    def sample(self, style: str) -> Tensor:
        """Sample an image for each prompt of a style: uint8 [N,C,H,W]. Image k has seed k."""
        assert self.relay is not None
        prompts, images = [own.prompt for own in self.prompts[style]], []
        dtype = autocast_dtype(self.options.precision)
        for start in range(0, len(prompts), self.options.batch):
            part = prompts[start : start + self.options.batch]
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                sampled = self.relay.sample(range(start, start + len(part)), prompt=part)
            images.append(self.relay.finish(sampled))
        return torch.cat(images)

    def sampled_row(self, style: str) -> dict[str, Any]:
        """Sample and measure the prompts of a style."""
        images = self.sample(style)
        top = self.top(style, self.features(images), self.prompts[style])
        return {"queries": "samples", "count": len(images)} | rounded(top) | self.distances(style, images)


def rounded(top: Sequence[float]) -> dict[str, str]:
    """Return the cells of the percentages."""
    return {name: f"{value:.2f}" for name, value in zip(TOP, top, strict=True)}


def settings(options: Options) -> DictConfig:
    """Compose the config of sample.py; without a relay it is that of any."""
    return compose("sample", [f"relay={options.relay or 'emoji'}", *options.overrides.split()])


def load(options: Options, cfg: DictConfig) -> Relay:
    """Build the relay and its text encoder."""
    validate_sampling(cfg)
    relay = build_relay(cfg.relay).eval()
    relay.check_text("relay")
    if options.stage not in relay.chain():
        raise UserError(f"stage={options.stage}: the stages of the relay are {', '.join(relay.chain())}")
    _ = relay.text_encoder  # report a missing one before anything is measured
    return relay


def run(options: Options) -> None:
    """Print and write the rows of each style and guidance scale."""
    for name, least in (("count", 0), ("gallery", 0), ("caption", 0), ("batch", 1), ("resolution", 1)):
        if getattr(options, name) < least:
            raise UserError(f"{name}={getattr(options, name)}: must be at least {least}")
    scales = positive_numbers("guidance", options.guidance, "need numbers above 0, with commas between them, e.g. 1,2")
    table = Table(Path(options.output), KEY, COLUMNS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_host(device)
    cfg = settings(options)
    relay = load(options, cfg).to(device) if options.relay else None
    scales = [] if relay is None else scales
    weights = "" if relay is None else weights_hash(relay.chain().values())
    bench = Bench(options, cfg, relay, device)
    print(environment())
    bench.prepare()

    def key_of(queries: str, style: str, count: int, guidance: object = "") -> list[str]:
        return [str(value) for value in (queries, options.relay, guidance, options.subset, style, count)]

    def add(row: dict[str, Any], style: str, guidance: object = "") -> None:
        cells = {name: str(value) for name, value in row.items()} | {"device": device_name(device)}
        table.add(key_of(row["queries"], style, row["count"], guidance), weights if guidance else "", cells)
        top = "  ".join(f"{name} {row[name]:>6} %" for name in TOP)
        others = "  ".join(f"{name} {row[name]}" for name in ("fid", "sfid") if name in row)
        what = f"{row['queries']}{f' x{guidance:g}' if guidance else ''}"
        print(f"{style:8} {what:14} {row['count']:>5} queries  {top}  {others}", flush=True)

    for scale in scales:
        for style in bench.styles:  # report rows of other weights before sampling
            table.find(key_of("samples", style, len(bench.prompts[style]), scale), weights)
    for style in bench.styles:
        for row in bench.real_rows(style):
            add(row, style)
    for scale in scales:
        relay.chain()[options.stage].guidance_scale = scale
        for style in bench.styles:
            began = time.perf_counter()
            add(bench.sampled_row(style), style, scale)
            print(f"  {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["guidance=1,2,4"], __doc__ or "", Options, run))
