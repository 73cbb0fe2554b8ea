"""Relay Diffusion: cascades of diffusion stages that start from each other's images (arXiv 2309.03350).

import relay_diffusion as rd

relay = rd.load_relay("demo/emoji")
images = relay.sample(seeds=range(4), prompt="red apple, 3D style")  # [4,3,256,256] in [-1, 1]
relay.to_pil(images)[0].save("emoji.png")
"""

from relay_diffusion.utils.lazy import lazy_exports

__version__ = "0.2.0"

_EXPORTS = {  # imported on first use (PEP 562): the package alone imports neither torch nor lightning
    "load_stage": "checkpoints.loading",
    "load_relay": "checkpoints.loading",
    "DiffusionStage": "models.stage",
    "Relay": "models.relay",
    "EDMSampler": "samplers.edm",
    "BlurringSampler": "samplers.blurring",
    "MultistepSampler": "samplers.multistep",
    "GaussianCorruption": "diffusion.corruption",
    "BlurringCorruption": "diffusion.corruption",
    "LinearCorruption": "diffusion.linear",
    "UserError": "errors",
}
__all__ = [*_EXPORTS, "__version__"]

__getattr__ = lazy_exports(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"_EXPORTS", "lazy_exports"})
