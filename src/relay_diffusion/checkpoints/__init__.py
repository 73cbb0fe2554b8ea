"""Read, load and write checkpoints and exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay_diffusion.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from relay_diffusion.checkpoints.encoders import load_text_encoder
    from relay_diffusion.checkpoints.loading import load_relay, load_stage

__all__ = ["load_relay", "load_stage", "load_text_encoder"]

# Checks of the configuration import this package without torch.
__getattr__ = lazy_exports(
    __name__, {"load_relay": "loading", "load_stage": "loading", "load_text_encoder": "encoders"}
)
