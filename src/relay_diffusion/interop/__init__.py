"""Weights of other implementations."""

from relay_diffusion.interop.official import load_official

__all__ = ["load_official"]
