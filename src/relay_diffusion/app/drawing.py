"""Draw images from noise, with the trajectory through all stages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from relay_diffusion.app.jobs import Job
from relay_diffusion.app.stage_settings import StageSettings, adjusted
from relay_diffusion.data.class_choice import class_indices
from relay_diffusion.errors import require
from relay_diffusion.models.relay import Relay
from relay_diffusion.samplers.recording import Step, TrajectoryRecorder, joined
from relay_diffusion.sampling.callbacks.trajectory_picture import frame
from relay_diffusion.sampling.plan import Plan, plan_from_noise
from relay_diffusion.utils.resolution import Size

SHOWN_IMAGES = 8  # of a trajectory, in one row
SHOWN_SIDE = 128  # pixels of an image in a trajectory


@dataclass(frozen=True)
class DrawOptions:
    """What to draw.

    seeds: numbers and ranges, as 0-7,12; each makes an image. chosen_class: name or number; None: all in turn by seed,
    -1: none. prompt: one in each line; seed k has prompt k, in turn. stages: settings by the names of stages.
    max_images: limit of one job; batch_size: images sampled at once.
    """

    seeds: str = "0-7"
    chosen_class: str | None = None
    prompt: str = ""
    negative_prompt: str = ""
    stages: Mapping[str, StageSettings] = field(default_factory=dict)
    max_images: int = 16
    batch_size: int = 8


class Frame(NamedTuple):
    """One step of a trajectory: noisy states above the estimates of the clean images.

    number: of so many `evaluations` of the stage, from 1; the last frame of a stage is its result, with sigma 0.
    """

    stage: str
    number: int
    evaluations: int
    sigma: float
    picture: Image.Image


class Drawing(NamedTuple):
    """Finished images with their captions, and the trajectory of the first few.

    evaluations: of the networks for one image, by stage.
    """

    images: list[Image.Image]
    captions: list[str]
    frames: list[Frame]
    evaluations: dict[str, int]
    seconds: float


def plan_images(relay: Relay, options: DrawOptions) -> Plan:
    """Plan one image per seed. Raises UserError for seeds, a class or text that the relay cannot draw."""
    classes = class_indices(options.chosen_class, relay.num_classes, relay.class_names)
    plan = plan_from_noise(options.seeds.strip(" []"), classes)
    count, most = len(plan.seeds), options.max_images
    require(count <= most, f"seeds={options.seeds}: {count:,} images; at most {most} at once, so use fewer seeds")
    for name, text in (("prompt", options.prompt), ("negative_prompt", options.negative_prompt)):
        if text.strip():
            relay.check_text(name)
    prompts = [line.strip() for line in options.prompt.splitlines() if line.strip()]
    return replace(plan, prompts=prompts or [""], negative_prompt=options.negative_prompt) if relay.text_dim else plan


def class_names(relay: Relay) -> list[str]:
    """Return the names of a relay's classes, or their numbers."""
    return relay.class_names or [str(index) for index in range(relay.num_classes)]


def draw(relay: Relay, options: DrawOptions, job: Job | None = None) -> Drawing:
    """Draw one image for each seed. Raises UserError for options that the relay refuses."""
    job, began = Job() if job is None else job, time.perf_counter()
    plan = plan_images(relay, options)
    captions = _captions(relay, plan)
    with adjusted(relay, options.stages):
        job.total = max(job.total, job.done + relay.evaluations() * len(plan.seeds))
        evaluations = {name: sampler.evaluations for name, sampler in relay.samplers.items()}
        images, steps = _sample(relay, options, plan, job)
    frames = [one for name, recorded in steps.items() for one in _frames(name, recorded)]
    return Drawing(images, captions, frames, evaluations, time.perf_counter() - began)


def _captions(relay: Relay, plan: Plan) -> list[str]:
    """Name seed, class and, if there are several, prompt of each image."""
    names, captions = class_names(relay), []
    for position, (seed, label) in enumerate(zip(plan.seeds, plan.labels, strict=True)):
        parts = [f"seed {seed}"]
        if label >= 0:
            parts.append(names[label])
        if len(plan.prompts or []) > 1:
            parts.append(plan.prompt(position))
        captions.append(" · ".join(parts))
    return captions


def _sample(
    relay: Relay, options: DrawOptions, plan: Plan, job: Job
) -> tuple[list[Image.Image], dict[str, list[Step]]]:
    images: list[Image.Image] = []
    steps: dict[str, list[Step]] = {}
    for first in range(0, len(plan.seeds), options.batch_size):
        batch = slice(first, first + options.batch_size)
        prompts = [plan.prompt(position) for position in range(len(plan.seeds))[batch]]
        text: dict[str, Any] = {"prompt": prompts} if relay.text_dim else {}
        if plan.negative_prompt.strip():
            text["negative_prompt"] = plan.negative_prompt
        with relay.observed(tile_observer=job), _recorded(relay, SHOWN_IMAGES - first, job) as recorders:
            stages = relay.sample_stages(plan.seeds[batch], plan.labels[batch], **text)
        images += relay.to_pil(list(stages.values())[-1])
        for name, recorder in recorders.items():
            recorded = recorder.finish(stages[name])
            steps[name] = joined(steps[name], recorded) if name in steps else recorded
    return images, steps


@contextmanager
def _recorded(relay: Relay, count: int, job: Job) -> Iterator[dict[str, TrajectoryRecorder]]:
    """Record the steps of the first `count` images, by stage.

    They become previews of the job.
    """
    if count <= 0:
        yield {}
        return
    recorders = {name: TrajectoryRecorder(count, _shown_size(relay.sizes[name])) for name in relay.chain()}

    def record(stage: str, x: Tensor, sigma: Tensor, estimate: Tensor) -> None:
        recorders[stage](x, sigma, estimate)
        job.preview = _picture(recorders[stage].steps[-1])

    with relay.observed(record):
        yield recorders


def _shown_size(size: Size) -> Size:
    scale = SHOWN_SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _picture(step: Step) -> Image.Image:
    return frame(step, _shown_size((step.states.shape[2], step.states.shape[3])))


def _frames(stage: str, steps: Sequence[Step]) -> list[Frame]:
    return [Frame(stage, number, len(steps) - 1, step.sigma, _picture(step)) for number, step in enumerate(steps, 1)]
