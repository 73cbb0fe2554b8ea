"""LightningModules of a relay: its stages and the chain of them."""

from relay_diffusion.models.cascade import CascadeStage
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import DiffusionStage, StageInfo

__all__ = ["CascadeStage", "DiffusionStage", "Relay", "StageInfo"]
