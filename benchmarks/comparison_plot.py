"""Print and plot the results of comparison.py.

python benchmarks/comparison_plot.py [key=value ...]

  points   the CSV                 (outputs/comparison/points.csv)
  curves   comma-separated names of curves to draw      (all)
  plot     the PNG to write        (outputs/comparison/comparison.png)

The Markdown table lists mean, lowest and highest value of the repeats of every point. The plot shows the mean of the
repeats that all drawn points have, so that all have the same seeds.
"""

from __future__ import annotations

import csv
import statistics
import sys
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import atomic_write

Rows = list[dict[str, str]]


@dataclass
class Options:
    """Options of this command; see above."""

    points: str = "outputs/comparison/points.csv"
    curves: str = ""
    plot: str = "outputs/comparison/comparison.png"


def grouped(path: Path) -> dict[tuple[str, str], Rows]:
    """Read the repeats of each (curve, overrides), in file order."""
    if not path.is_file():
        raise UserError(f"points={path}: no such file; run benchmarks/comparison.py first")
    groups: dict[tuple[str, str], Rows] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault((row["curve"], row["overrides"]), []).append(row)
    if not groups:
        raise UserError(f"points={path}: has no row; run benchmarks/comparison.py first")
    return groups


def with_common_repeats(groups: dict[tuple[str, str], Rows], curves: list[str]) -> dict[tuple[str, str], Rows]:
    """Keep these curves, and of their points the repeats that all have. Raises UserError if there are none."""
    chosen = {point: rows for point, rows in groups.items() if point[0] in curves}
    common = set.intersection(*({row["repeat"] for row in rows} for rows in chosen.values()))
    if not common:
        raise UserError(
            f"the points of {', '.join(curves)} have no repeat in common; choose some curves, as curves=A,B"
        )
    return {point: [row for row in rows if row["repeat"] in common] for point, rows in chosen.items()}


def spread(rows: Rows, column: str) -> tuple[float, float, float]:
    """Return mean, minimum and maximum of the repeats."""
    values = [float(row[column]) for row in rows]
    return statistics.fmean(values), min(values), max(values)


def median(rows: Rows, column: str) -> float:
    """Return the median of the repeats that have a value."""
    return statistics.median(float(row[column]) for row in rows if row[column])


def table(groups: dict[tuple[str, str], Rows]) -> str:
    """Print one line per point."""
    lines = ["| curve | settings | evaluations | TFLOP | s an image | FID | sFID | repeats |", "| --- " * 8 + "|"]
    for (curve, overrides), rows in groups.items():
        changed = " ".join(part.split("changes.")[-1] for part in overrides.split()[1:])
        shown = "{:.1f} ({:.1f}-{:.1f})" if len(rows) > 1 else "{:.1f}"
        fid, sfid = (shown.format(*spread(rows, column)) for column in ("fid", "sfid"))
        seconds = f"{median(rows, 'seconds'):.4f}" if any(row["seconds"] for row in rows) else ""
        cells = [
            curve,
            changed,
            rows[0]["evaluations"],
            f"{float(rows[0]['tflop']):.2f}",
            seconds,
            fid,
            sfid,
            len(rows),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def logarithmic(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Make both axes logarithmic, with plain numbers."""
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")


def plot(axes: Axes, points: list[tuple[float, Rows]], column: str, label: str, color: str) -> None:
    """Draw a column against the costs of the points.

    Bars go from the lowest to the highest repeat.
    """
    costs, spreads = zip(
        *((cost, spread(rows, column)) for cost, rows in sorted(points, key=itemgetter(0))), strict=True
    )
    mean, low, high = zip(*spreads, strict=True)
    below, above = ([abs(a - b) for a, b in zip(mean, ends, strict=True)] for ends in (low, high))
    axes.errorbar(costs, mean, [below, above], marker="o", markersize=4, capsize=2, label=label, color=color)


def draw(groups: dict[tuple[str, str], Rows], curves: list[str], path: Path) -> None:
    """Plot FID and sFID against operations and milliseconds per image."""
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    costs = {"tflop": ("TFLOP per image, all stages", 1), "seconds": ("ms per image, all stages", 1000)}
    qualities = {"fid": "FID", "sfid": "sFID"}
    panels = [(cost, quality) for quality in qualities for cost in costs]
    for axes, (cost, quality) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        unit, factor = costs[cost]
        for number, curve in enumerate(curves):
            groups_of_curve = [rows for (name, _), rows in groups.items() if name == curve]
            timed = [(factor * median(rows, cost), rows) for rows in groups_of_curve if any(row[cost] for row in rows)]
            if timed:
                plot(axes, timed, quality, curve.replace("_", " "), f"C{number}")
        logarithmic(axes, unit, qualities[quality])
        axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def run(options: Options) -> None:
    """Print the table and write the plot."""
    groups = grouped(Path(options.points))
    there = list(dict.fromkeys(curve for curve, _ in groups))
    curves = options.curves.split(",") if options.curves else there
    if unknown := [curve for curve in curves if curve not in there]:
        raise UserError(f"curves={unknown[0]} is not in {options.points}: it has {', '.join(sorted(there))}")
    print(table(groups))
    draw(with_common_repeats(groups, curves), curves, Path(options.plot))
    print(f"\n{options.plot}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or [f"points={Options.points}"], __doc__ or "", Options, run))
