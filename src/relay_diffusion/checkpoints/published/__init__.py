"""Checkpoints of other implementations."""

from relay_diffusion.checkpoints.published.edm import load_published

__all__ = ["load_published"]
