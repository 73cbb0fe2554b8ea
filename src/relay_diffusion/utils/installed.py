"""Installed libraries and their files."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from relay_diffusion.errors import require


def install_command(extra: str) -> str:
    """Return the command that installs an extra, in the repository."""
    return f"pip install -e '.[{extra}]'"


def require_library(what: str, library: str, extra: str) -> None:
    """Raise UserError naming `what` unless a library is installed.

    extra: of this package, which brings the library. Nothing is imported.
    """
    require(find_spec(library) is not None, f"{what} needs the library {library}: {install_command(extra)}")


def installed_path(package: str, inside: str) -> Path | None:
    """Locate a file or folder of a distribution, which is not imported.

    Returns None if the distribution or the file is missing.
    """
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        return None
    return path if path.exists() else None
