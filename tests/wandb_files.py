"""Read the files of offline W&B runs."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from wandb.util import get_core_path

SECONDS = 30  # until a finished run is written completely


def records(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Read the records of each part of a run, in order."""
    return [_finished(file) for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))]


def _finished(file: Path) -> list[dict[str, Any]]:
    """Read a file with `wandb leet inspect`, once its last record is written: W&B does that in another process."""
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
    deadline = time.monotonic() + SECONDS
    while True:
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = [json.loads(line) for line in printed.splitlines()]
        if any(record["type"] == "exit" for record in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def of_type(part: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind."""
    return [record[kind] for record in part if record["type"] == kind]


def rows_of(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the logged rows of all parts."""
    return [record["item"] for part in parts for record in of_type(part, "history")]


def files_of(part: list[dict[str, Any]], kind: str) -> dict[str, Path]:
    """Return the files of the artifacts of a type, by their path inside."""
    artifacts = [artifact for artifact in of_type(part, "artifact") if artifact["type"] == kind]
    contents = [entry for artifact in artifacts for entry in artifact["manifest"]["contents"]]
    return {entry["path"]: Path(entry["local_path"]) for entry in contents}
