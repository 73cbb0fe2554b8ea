"""Print and plot FID against network evaluations, as measured by grids.py.

python benchmarks/evaluations_plot.py [key=value ...]

  points   the CSV                                       (outputs/grids.csv)
  curves   yaml file with the curves of each panel       (benchmarks/evaluations.yaml)
  metric   fid or sfid                                   (fid)
  plot     the PNG to write                              (outputs/evaluations.png)

The evaluations are those of the first stage where a panel has several grids of it, else those of the last stage. Points
that are not measured are left out. The Markdown table lists the mean over the seeds, and lowest and highest value.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from comparison_plot import Rows, logarithmic, median, plot, spread
from grids import COLUMNS, curves
from matplotlib.figure import Figure
from measuring import read_rows

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import atomic_write

Panels = dict[str, dict[str, list[Rows]]]


@dataclass
class Options:
    """Options of this command; see above."""

    points: str = "outputs/grids.csv"
    curves: str = "benchmarks/evaluations.yaml"
    metric: str = "fid"
    plot: str = "outputs/evaluations.png"


def panels(options: Options) -> Panels:
    """The measured points of each curve of each panel.

    A point has a row for each seed.
    """
    measured: dict[tuple[str, str], Rows] = {}
    for row in read_rows(Path(options.points), COLUMNS, "points"):
        measured.setdefault((row["first"], row["last"]), []).append(row)
    return {
        panel: {curve: [measured[point] for point in points if point in measured] for curve, points in chosen.items()}
        for panel, chosen in curves(options.curves, "curves").items()
    }


def varied(chosen: dict[str, list[Rows]]) -> str:
    """The stage whose evaluations a panel varies: first or last."""
    return "first" if any(len({rows[0]["first"] for rows in points}) > 1 for points in chosen.values()) else "last"


def evaluations(rows: Rows, stage: str) -> int:
    """Network evaluations of the first or the last stage."""
    return int(rows[0]["evaluations"].split("+")[0 if stage == "first" else -1])


def table(found: Panels) -> str:
    """Print one line per point."""
    lines = [
        "| panel | curve | first | last | evaluations | TFLOP | s an image | FID | sFID | seeds |",
        "| --- " * 10 + "|",
    ]
    for panel, chosen in found.items():
        for curve, points in chosen.items():
            for rows in points:
                shown = "{:.1f} ({:.1f}-{:.1f})" if len(rows) > 1 else "{:.1f}"
                first, last, count = (rows[0][name] for name in ("first", "last", "evaluations"))
                cost = f"{float(rows[0]['tflop']):.2f}", f"{median(rows, 'seconds'):.5f}"
                quality = (shown.format(*spread(rows, column)) for column in ("fid", "sfid"))
                lines.append(f"| {' | '.join((panel, curve, first, last, count, *cost, *quality, str(len(rows))))} |")
    return "\n".join(lines)


def draw(found: Panels, metric: str, path: Path) -> None:
    """Plot a panel beside the other."""
    figure = Figure(figsize=(5 * len(found), 4.4), dpi=110, layout="constrained")
    colors: dict[str, str] = {}
    for axes, (panel, chosen) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        stage = varied(chosen)
        for curve, points in chosen.items():
            color = colors.setdefault(curve, f"C{len(colors)}")
            if points:
                plot(axes, [(evaluations(rows, stage), rows) for rows in points], metric, curve, color)
        logarithmic(axes, f"network evaluations of the {stage} stage", {"fid": "FID", "sfid": "sFID"}[metric])
        axes.set_xticks(sorted({evaluations(rows, stage) for points in chosen.values() for rows in points}))
        axes.set_title(panel, fontsize=10)
        axes.legend(fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def run(options: Options) -> None:
    """Print the table and write the plot."""
    if options.metric not in ("fid", "sfid"):
        raise UserError(f"metric={options.metric}: use fid or sfid")
    found = {panel: chosen for panel, chosen in panels(options).items() if any(chosen.values())}
    if not found:
        raise UserError(f"points={options.points}: has no point of {options.curves}; run benchmarks/grids.py first")
    print(table(found))
    draw(found, options.metric, Path(options.plot))
    print(f"\n{options.plot}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or [f"points={Options.points}"], __doc__ or "", Options, run))
