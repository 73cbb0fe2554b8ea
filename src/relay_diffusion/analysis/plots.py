"""Plots of `relay_diffusion.cli.spectrum`. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from relay_diffusion.analysis.spectrum import Curve, Settings, block_power, mixed_power, ring_means
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import atomic_write
from relay_diffusion.utils.installed import install_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = (("tab:blue", "-"), ("tab:red", "-"), ("black", ":"), ("tab:green", "--"), ("tab:orange", "-."))


Line = tuple[str, int, Tensor]  # label, resolution in pixels, values by ring


def plot(folder: Path, powers: dict[int, Tensor], settings: Settings, curves: Sequence[Sequence[Curve]]) -> None:
    """Draw spectrum.png and snr.png.

    spectrum.png shows the power of images and noise, snr.png the `curves`. The noise in spectrum.png has the first
    sigma; snr.png has a panel for each sigma. Raises UserError without matplotlib.
    """
    small, large, block, sigma = settings.small, settings.large, settings.block, settings.sigmas[0]
    variance = sigma**2
    mixed = mixed_power(large, block, settings.block_strength)
    lines = [
        (f"images at {small}", small, powers[small]),
        (f"images at {large}", large, powers[large]),
        (f"white noise, sigma {sigma:g}", large, variance * torch.ones_like(mixed)),
        (f"block noise of {block} at {large}, sigma {sigma:g}", large, variance * block_power(large, block)),
        (f"white + {settings.block_strength:g} block at {large}, sigma {sigma:g}", large, variance * mixed),
    ]
    by_ring = [(label, side, ring_means(power)) for label, side, power in lines]
    _save(_figure([("Power by frequency", by_ring)], "power of a DCT coefficient"), folder / "spectrum.png")
    panels = []
    for group in curves:
        lines = [(f"{c.resolution}, {c.noise} noise, sigma {c.sigma:g}", c.resolution, c.snr) for c in group]
        panels.append((f"Signal-to-noise ratio at sigma {group[0].sigma:g}", lines))
    _save(_figure(panels, "signal-to-noise ratio"), folder / "snr.png")


def _figure(panels: Sequence[tuple[str, Sequence[Line]]], unit: str) -> Figure:
    """Draw values by ring on logarithmic axes.

    Without ring 0 (frequency 0) and incomplete rings.
    """
    try:  # matplotlib is optional
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            f"plots=true needs matplotlib: `{install_command('analysis')}`, or plots=false; the CSV files are written"
        ) from None
    figure = Figure(figsize=(5.5 * len(panels), 4.2), dpi=110, layout="constrained")
    for index, (title, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), index)
        for (label, resolution, values), (color, dashes) in zip(lines, STYLES, strict=True):
            frequencies = [ring / 2 for ring in range(1, resolution)]
            axes.loglog(frequencies, values[1:resolution].tolist(), color=color, linestyle=dashes, label=label)
        axes.set(xlabel="frequency in cycles per image", ylabel=unit, title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
