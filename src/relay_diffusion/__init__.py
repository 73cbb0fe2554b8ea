"""Relay Diffusion: cascades of diffusion stages that start from each other's images (arXiv 2309.03350)."""

__version__ = "0.1.0"
