"""What every text encoder offers, and checks of prompts and widths."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from relay_diffusion.diffusion.text_states import TextStates, check_text
from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.messages import shorten
from relay_diffusion.utils.signatures import check_arguments

if TYPE_CHECKING:
    import torch

SHOWN = 3  # prompts in a note
MEMBERS = ("dim", "max_tokens", "hash", "truncated", "encode", "to", "unload")  # of a TextEncoder


class TextEncoder(Protocol):
    """Frozen encoder of prompts.

    dim: width D of the token states and of the pooled vector. max_tokens: length T of every encoded prompt. hash:
    SHA-256 of all that the states depend on.
    """

    @property
    def dim(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def hash(self) -> str: ...

    def truncated(self, prompts: Collection[str]) -> list[str]:
        """Return the prompts that have more than `max_tokens` tokens."""
        ...

    def encode(self, prompts: Sequence[str], note: bool = True) -> TextStates:
        """Encode prompts: tokens [B,T,D], mask [B,T], pooled [B,D].

        A prompt of no more than spaces has a mask of False and zeros. note: print which prompts are truncated.
        """
        ...

    def to(self, device: torch.device | str) -> Any:
        """Move the encoder to a device."""
        ...

    def unload(self) -> None:
        """Free the memory of the weights; the next `encode` loads them again."""
        ...


def check_prompts(prompts: Collection[str], option: str = "text") -> None:
    """Raise UserError naming `option` unless all prompts are valid text.

    Invalid are other types, lone surrogates and the null character, which tokenizers drop.
    """
    if isinstance(prompts, str):
        raise UserError(f"{option}: one string instead of a list of prompts; write [{shorten(prompts)!r}]")
    for number, prompt in enumerate(prompts):
        problem = None
        if not isinstance(prompt, str):
            problem = f"is of type {type(prompt).__name__}, not a string; put quotes around it"
        elif "\0" in prompt:
            problem = "has a null character; remove it"
        elif prompt.encode(errors="ignore").decode() != prompt:
            problem = "has a lone surrogate, half of a character; write it as UTF-8"
        if problem:
            raise UserError(f"{option}: prompt {number} ({shorten(prompt)}) {problem}")


def check_encoder(encoder: Any, option: str = "text") -> None:
    """Raise UserError naming `option` unless an object has the interface of TextEncoder."""
    where = f"{option}: {type(encoder).__name__}"
    missing = ", ".join(name for name in MEMBERS if getattr(encoder, name, None) is None)
    require(not missing, f"{where} has no {missing}; a text encoder needs {', '.join(MEMBERS)}")
    for name, arguments in (("truncated", ["prompts"]), ("to", ["device"]), ("unload", [])):
        check_arguments(f"{where}.{name}", getattr(encoder, name), arguments)
    check_arguments(f"{where}.encode", encoder.encode, ["prompts"], ["note"])
    for name in ("dim", "max_tokens"):
        value = getattr(encoder, name)
        require(isinstance(value, int) and value > 0, f"{where}.{name}={value}: must be a whole number, at least 1")
    require(
        isinstance(encoder.hash, str) and re.fullmatch("[0-9a-f]{64}", encoder.hash) is not None,
        f"{where}.hash={shorten(str(encoder.hash))}: must be a SHA-256 of 64 hexadecimal digits; use hashlib.sha256",
    )


def check_states(encoder: TextEncoder, states: TextStates, count: int) -> None:
    """Raise UserError unless states of `count` prompts fit their encoder. Values are not checked."""
    name = f"text: {type(encoder).__name__}.encode"
    try:
        check_text(f"{name}: its result", states, count)
    except ValueError as error:
        raise UserError(str(error)) from None
    length, width = states.tokens.shape[1:]
    require(width == encoder.dim, f"{name}: its result has {width} channels; must have dim={encoder.dim}")
    require(
        length <= encoder.max_tokens,
        f"{name}: its result has {length} tokens; must have max_tokens={encoder.max_tokens}",
    )


def check_width(encoder: TextEncoder, context_dim: int, option: str = "network.context_dim") -> None:
    """Raise UserError naming `option` unless the network takes the encoder's width."""
    if context_dim != encoder.dim:
        raise UserError(
            f"{option}={context_dim}: the text encoder gives {encoder.dim} dimensions; set {option}={encoder.dim}"
        )


def note_truncated(encoder: TextEncoder, prompts: Sequence[str]) -> None:
    """Print a note if prompts have more tokens than the encoder takes."""
    cut = encoder.truncated(prompts)
    if cut:
        different = list(dict.fromkeys(cut))
        shown = [f'"{shorten(prompt)}"' for prompt in different[:SHOWN]] + ["..."] * (len(different) > SHOWN)
        print(
            f"note: {len(cut):,} of {len(prompts):,} prompts have more than text.max_tokens={encoder.max_tokens} "
            f"tokens and are truncated: {', '.join(shown)}",
            flush=True,
        )
