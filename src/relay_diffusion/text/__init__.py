"""Frozen text encoders: a prompt -> token states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay_diffusion.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from relay_diffusion.text.base import TextEncoder, check_encoder, check_prompts, check_states, check_width
    from relay_diffusion.text.cache import CachedEncoder
    from relay_diffusion.text.transformers_encoder import TransformersEncoder

__all__ = [
    "CachedEncoder",
    "TextEncoder",
    "TransformersEncoder",
    "check_encoder",
    "check_prompts",
    "check_states",
    "check_width",
]

# Command line tools must start without torch.
__getattr__ = lazy_exports(
    __name__,
    {
        "CachedEncoder": "cache",
        "TextEncoder": "base",
        "TransformersEncoder": "transformers_encoder",
        "check_encoder": "base",
        "check_prompts": "base",
        "check_states": "base",
        "check_width": "base",
    },
)
