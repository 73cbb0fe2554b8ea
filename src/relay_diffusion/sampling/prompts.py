"""Prompts of a sampling run: where they come from, and their encoded states."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relay_diffusion.data.bounded_io import file_bytes, utf8_text
from relay_diffusion.data.captions import MAX_LENGTH
from relay_diffusion.data.class_choice import AS_REFERENCE, captions_like_reference
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.sources import existing_path
from relay_diffusion.data.start_images import StartImages
from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay
from relay_diffusion.sampling.options import SamplingOptions
from relay_diffusion.sampling.plan import Plan
from relay_diffusion.text.base import check_prompts, note_truncated
from relay_diffusion.utils.distributed import rank
from relay_diffusion.utils.messages import one_line, shorten
from relay_diffusion.utils.progress import progress

MANY_PROMPTS = 100  # a longer list is stored as its length and a checksum


def chosen_prompts(
    options: SamplingOptions, relay: Relay, start: ImageDataset | StartImages | None = None
) -> list[str] | None:
    """Return the prompts of a run, taken in turn by seed.

    None: the relay has no text. Without an option they are the captions of the starting images, or "", which is no
    text. Raises UserError for prompts that the relay cannot use, and for a text encoder that is missing or another one.
    """
    for option in ("prompt", "prompts", "negative_prompt"):
        if getattr(options, option) is not None:
            relay.check_text(option)
    if not relay.text_dim:
        return None
    prompts, option = _given(options, start)
    negative = options.negative_prompt or ""
    _check(prompts, option)
    _check([negative], "negative_prompt")
    if negative.strip():
        relay.check_negative("negative_prompt")
    if any(prompt.strip() for prompt in (*prompts, negative)):
        _ = relay.text_encoder  # report a missing or another encoder before sampling
    return prompts


def _given(options: SamplingOptions, start: ImageDataset | StartImages | None) -> tuple[list[str], str]:
    """Return the prompts and the option that they come from."""
    if options.prompt is not None and options.prompts is not None:
        raise UserError("prompt and prompts were given: remove one of them")
    if options.prompts is not None:
        return read_prompts(options.prompts), "prompts"
    if options.prompt == AS_REFERENCE:
        reference = options.reference
        if reference.path is None:
            raise UserError(f"prompt={AS_REFERENCE}: {reference.option} is null; give reference=FOLDER or ZIP")
        return captions_like_reference(reference.path, reference.subset, reference.option), "prompt"
    if options.prompt is not None:
        prompts = [options.prompt] if isinstance(options.prompt, str) else options.prompt
        if not prompts:
            raise UserError("prompt=[]: is empty; use prompt=null for no text")
        return prompts, "prompt"
    captions = [] if start is None else [texts[0] if texts else "" for texts in start.captions]
    return (captions, "relay.start") if any(captions) else ([""], "prompt")


def read_prompts(path: str) -> list[str]:
    """Read a UTF-8 text file with a prompt in each line.

    Blank lines are skipped, and a note counts them. Raises UserError for a file that cannot be read or has no prompts.
    """
    where = f"prompts={path}"
    file = existing_path(path, "prompts")
    try:
        content = file_bytes(Path(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({one_line(error)}); give a text file") from None
    lines = utf8_text(content, where).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{where}: has no prompts; write one in each line")
    if len(prompts) < len(lines) and rank() == 0:
        print(f"note: {len(lines) - len(prompts):,} empty lines of {where} are skipped", flush=True)
    return prompts


def _check(prompts: Sequence[str], option: str) -> None:
    check_prompts(prompts, option)
    for prompt in prompts:
        if len(prompt) > MAX_LENGTH:
            raise UserError(f"{option}: a prompt has {len(prompt):,} characters; use at most {MAX_LENGTH:,}")


def note_prompts(plan: Plan, relay: Relay, positions: Sequence[int]) -> None:
    """Print what users may not expect of the prompts of some images. Call on rank 0."""
    if plan.prompts is None or not positions:
        return
    used = dict.fromkeys([*(plan.prompt(position) for position in positions), plan.negative_prompt])
    texts = [text for text in used if text.strip()]
    if not any(prompt.strip() for prompt in plan.prompts):
        print(
            "note: no prompt is given, so images are sampled without text; prompt=TEXT or prompt=reference sets it",
            flush=True,
        )
    elif plan.start is None and (unused := len(plan.prompts) - len({seed % len(plan.prompts) for seed in plan.seeds})):
        print(
            f"note: {unused:,} of {len(plan.prompts):,} prompts have no seed; seed k has prompt k, in turn", flush=True
        )
    if texts:
        note_truncated(relay.text_encoder, texts)


def describe_prompts(plan: Plan, relay: Relay) -> dict[str, Any]:
    """Describe the text that the images depend on.

    Many prompts are described by their number and a checksum.
    """
    assert plan.prompts is not None
    prompts: Any = plan.prompts
    if len(prompts) > MANY_PROMPTS:
        digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
        prompts = {"count": len(prompts), "sha256": digest}
    return {
        "prompts": prompts,
        "negative_prompt": plan.negative_prompt,
        "encoder": relay.text_encoder.hash if plan.has_text else None,
    }


def summary(plan: Plan) -> str:
    """Return the prompts of a run in one line."""
    used = list(dict.fromkeys(plan.prompt(position) for position in range(len(plan.names))))
    shown = f'"{shorten(used[0])}"' if used[0].strip() else "no text"
    return shown if len(used) == 1 else f"{len(used):,}, the first one is {shown}"


class PromptStates:
    """Encoded prompts of a plan, on the CPU and without padding.

    They are encoded on the device of the relay. Memory grows with the number of tokens.
    """

    def __init__(self, relay: Relay, plan: Plan) -> None:
        self._relay, self._plan = relay, plan
        self._longest = relay.text_encoder.max_tokens if plan.has_text else 0  # the same for all batches of all runs
        self._states: dict[str, tuple[Tensor, Tensor]] = {}  # tokens [n,D] and pooled [D]

    def prepare(self, positions: Sequence[int], show_progress: bool = True) -> None:
        """Encode the prompts of images, each different one once.

        Frees the memory of the encoder afterwards.
        """
        prompts = {self._plan.prompt(position) for position in positions} | {self._plan.negative_prompt}
        missing = sorted({prompt for prompt in prompts if prompt.strip()} - self._states.keys())
        if not missing:
            return
        encoder = self._relay.text_encoder
        encoder.to(self._relay.device)
        with progress("encoding prompts", len(missing), "prompts", enabled=show_progress) as advance:
            for prompt in missing:
                tokens, mask, pooled = encoder.encode([prompt], note=False)
                self._states[prompt] = tokens[0][mask[0]].cpu(), pooled[0].cpu()
                advance()
        encoder.unload()

    def lookup(self, prompts: Sequence[str]) -> TextStates:
        """Return the states of prompts: tokens [B,T,D], mask [B,T], pooled [B,D], float32.

        T is `max_tokens` of the encoder, or 0 if the plan has no text.
        """
        tokens = torch.zeros(len(prompts), self._longest, self._relay.text_dim)
        mask = torch.zeros(len(prompts), self._longest, dtype=torch.bool)
        pooled = torch.zeros(len(prompts), self._relay.text_dim)
        for row, prompt in enumerate(prompts):
            if prompt.strip():
                states, pooled[row] = self._states[prompt]
                tokens[row, : len(states)], mask[row, : len(states)] = states, True
        return TextStates(tokens, mask, pooled)
