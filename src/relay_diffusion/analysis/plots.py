"""Plots of the tool `relay_diffusion.cli.spectrum`; the only file that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from relay_diffusion.analysis.spectrum import Curve, Settings, block_power, mixed_power, ring_means, white_power
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = (("tab:blue", "-"), ("tab:red", "-"), ("black", ":"), ("tab:green", "--"), ("tab:orange", "-."))


def _figure(panels: int) -> Figure:
    try:  # here: matplotlib is optional
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "plots=true needs matplotlib: `pip install -e '.[analysis]'`, or plots=false; the CSV files are written"
        ) from None
    figure = Figure(figsize=(5.5 * panels, 4.2), dpi=110, layout="constrained")
    figure.subplots(1, panels)
    return figure


def _line(axes: Axes, values: Tensor, resolution: int, style: tuple[str, str], label: str) -> None:
    """Values by ring on logarithmic axes, without ring 0, which they cannot show, and without incomplete rings."""
    frequencies = [ring / 2 for ring in range(1, resolution)]
    axes.loglog(frequencies, values[1:resolution].tolist(), color=style[0], linestyle=style[1], label=label)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(xlabel="frequency in cycles per image", ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def plot(folder: Path, powers: dict[int, Tensor], settings: Settings, curves: Sequence[Sequence[Curve]]) -> None:
    """spectrum.png: power of the images and of noise of the first sigma; snr.png: `curves`, a panel for each sigma.

    Errors: UserError if matplotlib is missing.
    """
    small, large, sigma = settings.small, settings.large, settings.sigmas[0]
    figure = _figure(1)
    mixed = mixed_power(large, settings.block, settings.block_strength)
    lines = [
        (powers[small], f"images at {small}"),
        (powers[large], f"images at {large}"),
        (sigma**2 * white_power(large), f"white noise, sigma {sigma:g}"),
        (sigma**2 * block_power(large, settings.block), f"block noise of {settings.block} at {large}, sigma {sigma:g}"),
        (sigma**2 * mixed, f"white + {settings.block_strength:g} block at {large}, sigma {sigma:g}"),
    ]
    for (power, label), style in zip(lines, STYLES, strict=True):
        _line(figure.axes[0], ring_means(power), len(power), style, label)
    _finish(figure.axes[0], "Power by frequency", "power of a DCT coefficient")
    _save(figure, folder / "spectrum.png")

    figure = _figure(len(curves))
    for axes, group in zip(figure.axes, curves, strict=True):
        for curve, style in zip(group, STYLES, strict=True):
            label = f"{curve.resolution}, {curve.noise} noise, sigma {curve.sigma:g}"
            _line(axes, curve.snr, curve.resolution, style, label)
        _finish(axes, f"What noise of sigma {group[0].sigma:g} leaves", "signal-to-noise ratio")
    _save(figure, folder / "snr.png")
