"""Random text for the networks of tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relay_diffusion.diffusion.text_states import TextStates


def random_text(
    lengths: Sequence[int], dim: int = 6, tokens: int = 5, generator: torch.Generator | None = None
) -> TextStates:
    """Return rows of `lengths` tokens, padded to `tokens`; a row of length 0 has no text."""
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    pooled = torch.randn(len(lengths), dim, generator=generator) * mask.any(1, keepdim=True)
    return TextStates(torch.randn(len(lengths), tokens, dim, generator=generator), mask, pooled)
