"""Steps and guidance of the stages of a relay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from relay_diffusion.checkpoints.loading import stored_sampler, with_steps
from relay_diffusion.errors import UserError, prefix_errors, require
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.samplers import Sampler
from relay_diffusion.utils.messages import shorten

LEAST_MAX_STEPS = 40  # of the slider, whatever the number of steps of the checkpoint
MAX_GUIDANCE = 8.0


@dataclass(frozen=True)
class StageSettings:
    """Settings of one stage; None keeps that of the relay. sampler: replaces the stage's, without `steps`."""

    steps: int | None = None
    guidance_scale: float | None = None
    sampler: Sampler | None = None


def stored_steps(stage: DiffusionStage) -> int | None:
    """Return the steps of a stage's sampler as in its config; None: it has no such option."""
    steps = (stored_sampler(stage) or {}).get("steps")
    return steps if isinstance(steps, int) else None


def max_steps(stage: DiffusionStage) -> int:
    """Return the largest number of steps that the page offers."""
    return max(LEAST_MAX_STEPS, 2 * (stored_steps(stage) or 0))


def can_guide(stage: DiffusionStage) -> bool:
    """Return whether a stage supports guidance."""
    conditional = stage.num_classes > 0 or stage.text_dim > 0
    return stage.guide is not None or (conditional and stage.label_dropout > 0)


def _with_steps(stage: DiffusionStage, name: str, steps: int) -> Sampler:
    """Return the sampler of a stage with another number of steps.

    name: of the stage, for messages. Raises UserError for a number that it cannot have.
    """
    config, stored, most = stored_sampler(stage), stored_steps(stage), max_steps(stage)
    if config is None or stored is None:
        raise UserError(f"steps of {name}: its sampler has no such option; leave it as it is")
    whole = isinstance(steps, int) and 1 <= steps <= most
    require(whole, f"steps of {name} is {shorten(steps)}: must be a whole number from 1 to {most}")
    if steps == stored:
        return stage.sampler
    return with_steps(config, steps, f"steps of {name}")


@contextmanager
def adjusted(relay: Relay, settings: Mapping[str, StageSettings]) -> Iterator[None]:
    """Change the stages of a relay in this block.

    settings: by the names of stages. Only one thread may use the relay. Raises UserError for settings that a stage
    refuses.
    """
    chain = relay.chain()
    samplers = {name: wanted.sampler for name, wanted in settings.items() if wanted.sampler is not None}
    scales = {name: wanted.guidance_scale for name, wanted in settings.items() if wanted.guidance_scale is not None}
    for name, wanted in settings.items():
        if wanted.steps is not None and wanted.sampler is None:
            samplers[name] = _with_steps(chain[name], name, wanted.steps)
    for name, scale in scales.items():
        allowed = 0 <= scale <= MAX_GUIDANCE
        require(allowed, f"guidance of {name} is {shorten(scale)}: must lie between 0 and {MAX_GUIDANCE:g}")
    with relay.changed(samplers, scales):
        for name in settings:
            with prefix_errors(f"guidance of {name}"):
                chain[name].guided_denoiser()
        yield
