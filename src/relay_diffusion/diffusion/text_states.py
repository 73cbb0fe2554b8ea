"""Text as a condition: encoded prompts, one row per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TextStates(NamedTuple):
    """Encoded prompts: token states [B,T,D], mask [B,T], pooled [B,D].

    mask: bool, True where there is a token; other token states are padding. A row without text has mask all False and
    pooled 0.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def select(self, rows: Tensor | slice | Sequence[int]) -> TextStates:
        """Return some of the rows, in the given order."""
        return TextStates(*(part[rows] for part in self))

    def drop(self, dropped: Tensor) -> TextStates:
        """Remove the text of the rows where `dropped`, bool [B], is True."""
        dropped = dropped[:, None]
        return TextStates(self.tokens, self.mask & ~dropped, self.pooled.masked_fill(dropped, 0))

    def pad(self, count: int) -> TextStates:
        """Pad to `count` tokens; at least as many as there are."""
        missing = count - self.tokens.shape[1]
        assert missing >= 0
        return TextStates(F.pad(self.tokens, (0, 0, 0, missing)), F.pad(self.mask, (0, missing)), self.pooled)

    def to(self, device: torch.device | str) -> TextStates:
        """Copy to a device; asynchronously from the CPU to a GPU."""
        to_gpu = torch.device(device).type == "cuda"
        return TextStates(*(part.to(device, non_blocking=to_gpu) for part in self))


def no_text(count: int, dim: int, device: torch.device | str | None = None) -> TextStates:
    """Return `count` rows without text: tokens [count,0,dim], float32."""
    return TextStates(
        torch.zeros(count, 0, dim, dtype=torch.float32, device=device),
        torch.zeros(count, 0, dtype=torch.bool, device=device),
        torch.zeros(count, dim, dtype=torch.float32, device=device),
    )


def concatenate(parts: Sequence[TextStates]) -> TextStates:
    """Concatenate the rows of several texts, padded to the longest."""
    most = max(part.tokens.shape[1] for part in parts)
    return TextStates(*(torch.cat(tensors) for tensors in zip(*(part.pad(most) for part in parts), strict=True)))


def check_text(name: str, text: TextStates, count: int) -> None:
    """Raise ValueError unless text is TextStates of `count` rows.

    name: the argument in the message. Values are not checked.
    """
    if not isinstance(text, TextStates):
        raise ValueError(f"{name} is {type(text).__name__}: must be TextStates, as a text encoder returns them")
    tokens, mask, pooled = text
    fits = tokens.ndim == 3 and mask.shape == tokens.shape[:2] and pooled.shape == (len(tokens), tokens.shape[2])
    if not fits or mask.dtype != torch.bool or not (tokens.is_floating_point() and pooled.is_floating_point()):
        shapes = ", ".join(f"{part.dtype} of shape {tuple(part.shape)}" for part in text)
        raise ValueError(f"{name} holds {shapes}: must be floats [B,T,D], bool [B,T], floats [B,D]")
    if len(tokens) != count:
        raise ValueError(f"{name} has {len(tokens)} rows: must have {count}")
