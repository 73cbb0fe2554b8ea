"""Git revision of the running code."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def git_revision(file: Path = Path(__file__)) -> dict[str, Any]:
    """Return the commit of the checkout that tracks `file`.

    Keys "commit" and "uncommitted_changes"; empty without git.
    """
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)  # fails in another project's checkout
        commit, changes = _git(file.parent, "rev-parse", "HEAD"), _git(file.parent, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "uncommitted_changes": bool(changes)}


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
