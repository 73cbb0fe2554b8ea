"""Print and plot perception against distortion, as measured by enlarging.py.

python benchmarks/enlarging_plot.py [key=value ...]

  points   the CSV            (outputs/enlarging.csv)
  plot     the PNG to write   (outputs/enlarging.png)

FID (perception) and PSNR (distortion) cannot both be best (Blau and Michaeli, arXiv 1711.06077). A curve joins the
grids that differ in the number of steps only; its points name the network evaluations. Several seeds are averaged.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from enlarging import COLUMNS, INTERPOLATIONS
from matplotlib.figure import Figure
from measuring import read_rows

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import atomic_write

SHOWN = {  # column: heading and format
    "tflop": ("TFLOP", ".3f"),
    "seconds": ("s an image", ".5f"),
    "fid": ("FID", ".2f"),
    "sfid": ("sFID", ".2f"),
    "psnr": ("PSNR", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "agreement": ("agreement", ".2f"),
}
Point = dict[str, float]


@dataclass
class Options:
    """Options of this command; see above."""

    points: str = "outputs/enlarging.csv"
    plot: str = "outputs/enlarging.png"


def averaged(path: Path) -> dict[str, Point]:
    """The mean values of each method over its seeds.

    Raises UserError unless all rows are of the same stage and crops.
    """
    rows = read_rows(path, COLUMNS, "points")
    if not rows:
        raise UserError(f"points={path}: has no row; run benchmarks/enlarging.py first")
    if len({tuple(row[name] for name in ("stage", "images", "subset", "count")) for row in rows}) > 1:
        raise UserError(f"points={path}: has rows of several stages or sets of crops; use a file for each")
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    columns = ("evaluations", *SHOWN)
    return {
        method: {column: statistics.fmean(float(row[column]) for row in group) for column in columns}
        for method, group in groups.items()
    }


def table(points: dict[str, Point]) -> str:
    """Print one line per method."""
    lines = [f"| method | evaluations | {' | '.join(heading for heading, _ in SHOWN.values())} |"]
    lines.append("| --- " * (2 + len(SHOWN)) + "|")
    for method, point in points.items():
        cells = [format(point[column], style) for column, (_, style) in SHOWN.items()]
        lines.append(f"| {method} | {point['evaluations']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(points: dict[str, Point]) -> dict[str, list[Point]]:
    """Points by curve: an interpolation, or a grid without its number of steps."""
    found: dict[str, list[Point]] = {}
    for method, point in points.items():
        prefix, colon, grid = method.rpartition(":")
        name = method if method in INTERPOLATIONS else prefix + colon + grid.partition("/")[2]
        found.setdefault(name, []).append(point)
    return {name: sorted(points, key=lambda point: point["evaluations"]) for name, points in found.items()}


def draw(points: dict[str, Point], path: Path) -> None:
    """Plot FID against PSNR."""
    figure = Figure(figsize=(6, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, curve in curves(points).items():
        psnr, fid = ([point[column] for point in curve] for column in ("psnr", "fid"))
        label = name if name in INTERPOLATIONS else f"relay stage, {name}"
        axes.plot(psnr, fid, marker="s" if name in INTERPOLATIONS else "o", label=label)
        for point in curve:
            if point["evaluations"]:
                place = (point["psnr"], point["fid"])
                axes.annotate(f"{point['evaluations']:.0f}", place, (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="PSNR [dB], higher: less distortion", ylabel="FID, lower: better perception")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def run(options: Options) -> None:
    """Print the table and write the plot."""
    points = averaged(Path(options.points))
    print(table(points))
    draw(points, Path(options.plot))
    print(f"\n{options.plot}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or [f"points={Options.points}"], __doc__ or "", Options, run))
