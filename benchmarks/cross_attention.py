"""Time networks with and without text: the share of cross-attention.

python benchmarks/cross_attention.py [key=value ...]

Random weights, synthetic images and prompts on the device, bf16. The share is that of all layers of text:
cross-attention, its normalization, and the pooled vector.

  experiments  names in conf/experiment with text, with commas between them  (emoji_text_64,emoji_text_256)
  batch        images per batch                                              (64)
  tokens       tokens of each prompt                                         (32)
  repeats      timed runs after three warm-up runs                           (15)
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass

import torch
from network import WORK, build
from timing import environment, line, seconds

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.errors import UserError

WIDTH = 384  # of MiniLM's token states


@dataclass
class Options:
    """Options of this command; see above."""

    experiments: str = "emoji_text_64,emoji_text_256"
    batch: int = 64
    tokens: int = 32
    repeats: int = 15


def prompts(batch: int, tokens: int, width: int, device: torch.device) -> TextStates:
    """Draw encoded prompts in the precision of a batch of training data."""
    states = TextStates(
        torch.randn(batch, tokens, width, dtype=torch.float16),
        torch.ones(batch, tokens, dtype=torch.bool),
        torch.randn(batch, width, dtype=torch.float16),
    )
    return states.to(device)


def run(options: Options) -> None:
    """Print a row with text, one without, and the share, for each network and work."""
    for name in ("batch", "tokens", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1")
    print(environment())
    torch.backends.cudnn.benchmark = True
    for experiment in options.experiments.split(","):
        for kind, prepare in WORK.items():
            medians = []
            for width in (WIDTH, 0):
                stage = build(experiment, "text=none", "stage.guidance_scale=1", f"network.context_dim={width}")
                text = prompts(options.batch, options.tokens, width, stage.device) if width else None
                times = seconds(prepare(stage, options.batch, text), options.repeats)
                medians.append(statistics.median(times))
                name = f"{experiment} {kind}, {'with' if width else 'without'} text"
                print(line(name, times, options.batch), flush=True)
                del stage
            print(f"{experiment} {kind}: {1 - medians[1] / medians[0]:.1%} for text", flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["batch=64"], __doc__ or "", Options, run))
