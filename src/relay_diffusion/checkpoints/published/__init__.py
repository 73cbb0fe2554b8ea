"""Weights of other implementations."""

from relay_diffusion.checkpoints.published.edm import load_official

__all__ = ["load_official"]
