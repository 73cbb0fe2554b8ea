"""Print and plot the results of comparison.py.

python benchmarks/comparison_plot.py [key=value ...]

  points   the CSV                 (outputs/comparison/points.csv)
  curves   comma-separated names of curves to draw     (relay,cascade,single)
  plot     the PNG to write        (outputs/comparison/comparison.png)

The Markdown table lists mean, lowest and highest value of the repeats of every curve.
"""

from __future__ import annotations

import csv
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

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
    curves: str = "relay,cascade,single"
    plot: str = "outputs/comparison/comparison.png"


def grouped(path: Path) -> dict[tuple[str, str], Rows]:
    """Read the repeats of each (curve, overrides), in file order."""
    if not path.is_file():
        raise UserError(f"points={path}: no such file; run benchmarks/comparison.py first")
    groups: dict[tuple[str, str], Rows] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault((row["curve"], row["overrides"]), []).append(row)
    return groups


def spread(rows: Rows, column: str) -> tuple[float, float, float]:
    """Return mean, minimum and maximum of the repeats."""
    values = [float(row[column]) for row in rows]
    return statistics.fmean(values), min(values), max(values)


def table(groups: dict[tuple[str, str], Rows]) -> str:
    """Print one line per point."""
    lines = ["| curve | settings | evaluations | TFLOP | s an image | FID | sFID | repeats |", "| --- " * 8 + "|"]
    for (curve, overrides), rows in groups.items():
        changed = " ".join(part.split("changes.")[-1] for part in overrides.split()[1:])
        times = [float(row["seconds"]) for row in rows if row["seconds"]]
        shown = "{:.1f} ({:.1f}-{:.1f})" if len(rows) > 1 else "{:.1f}"
        fid, sfid = (shown.format(*spread(rows, column)) for column in ("fid", "sfid"))
        seconds = f"{statistics.median(times):.4f}" if times else ""
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


def draw(groups: dict[tuple[str, str], Rows], curves: list[str], path: Path) -> None:
    """Plot FID and sFID against the operations per image."""
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("fid", "sfid"), strict=True):
        for curve in curves:
            points = sorted(
                (float(rows[0]["tflop"]), *spread(rows, column)) for (name, _), rows in groups.items() if name == curve
            )
            tflop, mean, low, high = zip(*points, strict=True)
            below, above = ([abs(a - b) for a, b in zip(mean, ends, strict=True)] for ends in (low, high))
            axes.errorbar(tflop, mean, yerr=[below, above], marker="o", markersize=4, capsize=2, label=curve)
        axes.set(
            xlabel="TFLOP an image, all stages",
            ylabel={"fid": "FID", "sfid": "sFID"}[column],
            xscale="log",
            yscale="log",
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def run(options: Options) -> None:
    """Print the table and write the plot."""
    groups, curves = grouped(Path(options.points)), options.curves.split(",")
    there = {curve for curve, _ in groups}
    if unknown := [curve for curve in curves if curve not in there]:
        raise UserError(f"curves={unknown[0]} is not in {options.points}: it has {', '.join(sorted(there))}")
    print(table(groups))
    draw(groups, curves, Path(options.plot))
    print(f"\n{options.plot}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or [f"points={Options.points}"], __doc__ or "", Options, run))
