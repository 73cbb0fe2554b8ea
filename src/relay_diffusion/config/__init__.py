"""Checks of the configuration. Imports neither torch nor lightning."""

from relay_diffusion.utils.files import CONF

__all__ = ["CONF"]
