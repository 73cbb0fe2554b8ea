"""Checks of the configuration, and where it lies. Imports neither torch nor lightning."""

from pathlib import Path

__all__ = ["CONF"]

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parents[1] / "conf"  # of an installed package, or the project
