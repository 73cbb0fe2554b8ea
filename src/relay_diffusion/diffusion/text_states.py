"""Encoded prompts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TextStates(NamedTuple):
    """Encoded prompts: token states [B,T,D], mask [B,T] (bool, True: a token), pooled [B,D].

    An image without text has a mask of False and a pooled vector of 0.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
