"""Compare samplers at equal cost, in network evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf

from relay_diffusion.app.drawing import Drawing, DrawOptions, draw, plan_images
from relay_diffusion.app.jobs import Job
from relay_diffusion.app.stage_settings import StageSettings
from relay_diffusion.checkpoints.loading import build_sampler
from relay_diffusion.errors import UserError, require
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.samplers import MultistepSampler, Sampler
from relay_diffusion.utils.files import CONF

MAX_EVALUATIONS = 47  # of one stage; the first stage of emoji has as many with the published sampler
LEAST_EVALUATIONS = 3  # of one stage: two levels of a second-order sampler
MULTISTEP, SECOND_ORDER = "Multistep", "Second order"
SAMPLERS = {  # titles and explanations
    MULTISTEP: "Second order with one evaluation a step; noise levels as in the relay, or as found for emoji.",
    SECOND_ORDER: "Heun steps of two evaluations, with the published noise levels.",
}


class Compared(NamedTuple):
    """Images of one sampler."""

    title: str
    drawing: Drawing


def can_compare(relay: Relay) -> bool:
    """Return whether a relay draws from noise and can change its samplers."""
    return relay.start_size is None and all(stage.info.config for stage in relay.chain().values())


def samplers_to_compare(stage: DiffusionStage) -> dict[str, dict[str, Any]]:
    """Return the settings of both samplers for a stage, by their titles.

    Multistep as the checkpoint has it or as in conf/sampler, second order with its published noise levels.
    """
    from_noise = stage.corruption.block == 1
    multistep = _choice("multistep") if from_noise else _choice("multistep", "multistep_relay")
    if isinstance(stage.sampler, MultistepSampler) and stage.info.config is not None:
        multistep = stage.info.config["sampler"]
    return {MULTISTEP: multistep, SECOND_ORDER: _choice("edm" if from_noise else "blurring")}


def _choice(*names: str) -> dict[str, Any]:
    """Return choices of conf/sampler without their corruption.

    Later choices replace values of earlier ones.
    """
    settings: dict[str, Any] = {}
    for name in names:
        settings |= cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF / "sampler" / f"{name}.yaml")))
    return {key: value for key, value in settings.items() if key not in ("corruption", "defaults")}


def with_evaluations(stage: DiffusionStage, settings: Mapping[str, Any], evaluations: int) -> Sampler:
    """Build a sampler of so many network evaluations.

    settings: of the sampler; its `steps` are searched. Raises UserError if no number of steps gives them.
    """
    for steps in range((evaluations + 1) // 2, 20 * evaluations):  # at most two evaluations a step
        try:
            sampler = build_sampler(stage, {**settings, "steps": steps})
        except UserError:  # too few steps for this sampler
            continue
        if sampler.evaluations == evaluations:
            return sampler
        if sampler.evaluations > evaluations:
            break
    raise UserError(f"evaluations={evaluations}: second-order samplers need an odd number from {LEAST_EVALUATIONS} on")


def compare(
    relay: Relay, options: DrawOptions, evaluations: Mapping[str, int], job: Job | None = None
) -> list[Compared]:
    """Draw the same seeds with both samplers.

    evaluations: of each stage by its name. The guidance of `options.stages` applies to both. Raises UserError for
    options that the relay refuses.
    """
    job = Job() if job is None else job
    plan = plan_images(relay, options)
    for name, count in evaluations.items():
        require(
            LEAST_EVALUATIONS <= count <= MAX_EVALUATIONS,
            f"evaluations of {name} is {count}: must lie between {LEAST_EVALUATIONS} and {MAX_EVALUATIONS}",
        )
    chain = relay.chain()
    settings = {name: samplers_to_compare(chain[name]) for name in evaluations}
    stages: dict[str, dict[str, StageSettings]] = {title: {} for title in SAMPLERS}
    for name, count in evaluations.items():
        for title in SAMPLERS:
            guidance = options.stages.get(name, StageSettings()).guidance_scale
            sampler = with_evaluations(chain[name], settings[name][title], count)
            stages[title][name] = StageSettings(guidance_scale=guidance, sampler=sampler)
    job.total = len(SAMPLERS) * len(plan.seeds) * sum(evaluations.values())
    return [Compared(title, draw(relay, replace(options, stages=stages[title]), job)) for title in SAMPLERS]
