"""Print the results of a sampling run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

MEASURES = (
    ("fid", "FID", ".2f"),
    ("sfid", "sFID", ".2f"),
    ("inception_score", "Inception Score", ".2f"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
    ("kid", "KID", ".5f"),
)
OTHERS = (
    ("images", "images", ","),
    ("prompts", "prompts", ""),
    ("negative_prompt", "negative prompt", ""),
    ("folder", "images in", ""),
    ("npz", "for ADM's evaluator", ""),
    ("picture", "picture", ""),
    ("trajectory", "trajectory", ""),
    ("numbers", "numbers in", ""),
)


def report(results: Mapping[str, Any]) -> None:
    """Print the results as a table.

    Paths, skipped metrics and warnings follow. "names" in the results lists the computed metrics, custom ones included.
    """
    table = Table(show_header=False, box=None)
    listed = {key for key, _, _ in (*MEASURES, *OTHERS)}
    own = [(name, name, ".6g") for name in results.get("names", ()) if name not in listed]
    for key, label, form in (*MEASURES, *own, *OTHERS):
        if key in results:
            table.add_row(label, format(results[key], form))
    if kept := results.get("images", 0) - results.get("sampled_now", results.get("images", 0)):
        table.add_row("resumed", f"{kept:,} of these images existed already")
    if "block_mean_error" in results:
        table.add_row("block means", f"RMS error {results['block_mean_error']:.2f} gray levels against relay.start")
    for name, reason in results.get("not_measured", {}).items():
        table.add_row(name, f"not measured: {reason}")
    for warning in results.get("warnings", []):
        table.add_row("warning", warning)
    for departure in results.get("departures", []):
        table.add_row("not as published", departure)
    if "saved_evaluations" in results:
        table.add_row("early hand-over", f"network evaluations saved per image: {results['saved_evaluations']}")
    Console(soft_wrap=True, markup=False, emoji=False).print(table)  # prompts may look like either
