"""Files of installed distributions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def installed_path(package: str, inside: str) -> Path | None:
    """Locate a file or folder of a distribution, which is not imported.

    Returns None if the distribution or the file is missing.
    """
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        return None
    return path if path.exists() else None
