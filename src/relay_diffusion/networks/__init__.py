"""UNet of every stage, and the preconditioner that makes it a denoiser."""

from relay_diffusion.networks.cuda_graphs import Graphed, GraphedTraining
from relay_diffusion.networks.preconditioning import Condition, Conditioned, EDMPreconditioner, Prompted, Prompts
from relay_diffusion.networks.unet import UNet

__all__ = [
    "Condition",
    "Conditioned",
    "EDMPreconditioner",
    "Graphed",
    "GraphedTraining",
    "Prompted",
    "Prompts",
    "UNet",
]
