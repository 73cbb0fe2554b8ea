"""The page: components and the functions that they call.

The only module that imports gradio, together with `server`.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from relay_diffusion.app.comparing import (
    LEAST_EVALUATIONS,
    MAX_EVALUATIONS,
    SAMPLERS,
    can_compare,
    compare,
)
from relay_diffusion.app.drawing import DrawOptions, Frame, class_names, draw
from relay_diffusion.app.enlarging import enlarge, read_image
from relay_diffusion.app.jobs import CancelledJobError, Job, follow
from relay_diffusion.app.stage_settings import MAX_GUIDANCE, StageSettings, can_guide, max_steps, stored_steps
from relay_diffusion.app.studio import Studio
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import DiffusionStage

Result = TypeVar("Result")

ALL, NO_CLASS = "all in turn", "none"
FIRST_GUIDANCE = 2.0  # of the first stage, if the relay has none: as in `make demo`
KEPT_SECONDS = 3600  # of trajectories and image files
SWEEP_SECONDS = 600  # between two removals of old files
EXCLUSIVE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "networks", "show_progress": "hidden"}
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")  # none is downloaded
MONOSPACE = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto; }
#title h1 { margin: 0.2rem 0 0; font-size: 1.5rem; letter-spacing: -0.01em; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
.heading h3 { margin: 0; font-size: 0.95rem; }
.heading p { margin: 0; font-size: 0.85rem; color: var(--body-text-color-subdued); }
.pictures .grid-wrap { min-height: 0 !important; max-height: none !important; overflow: visible !important; }
.pictures .caption-label { font-size: 0.72rem; padding: 0 0.4rem; max-width: 100%; }
.status { min-height: 2.9rem; padding: 0.2rem 0; }
.status progress { appearance: none; width: 100%; height: 0.5rem; border: 0; border-radius: 4px; overflow: hidden;
  background: var(--border-color-primary); }
.status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.status progress::-webkit-progress-value { background: var(--color-accent); transition: width 0.2s; }
.status progress::-moz-progress-bar { background: var(--color-accent); }
.status p { margin: 0.15rem 0 0; font-size: 0.9rem; color: var(--body-text-color-subdued); }
.status p[role=alert] { color: var(--error-text-color); background: var(--error-background-fill);
  border-left: 4px solid var(--error-border-color); border-radius: 4px; padding: 0.5rem 0.75rem; }
.caption p { margin: 0; text-align: center; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
"""


def build_page(studio: Studio) -> gr.Blocks:
    """Build the page of what the models of a studio can do."""
    with gr.Blocks(
        title="relay-diffusion", analytics_enabled=False, delete_cache=(SWEEP_SECONDS, KEPT_SECONDS)
    ) as page:
        gr.Markdown(f"# relay={studio.name}\n{studio.summary}", elem_id="title")
        if studio.draws:
            with gr.Tab("Draw", id="draw"):
                _draw_tab(studio)
        if studio.enlargers:
            with gr.Tab("Enlarge", id="enlarge"):
                _enlarge_tab(studio)
        if can_compare(studio.relay):
            with gr.Tab("Compare", id="compare"):
                _compare_tab(studio)
    return page


def page_style() -> dict[str, Any]:
    """Return the theme and CSS of the page. They need no files of other hosts."""
    theme = gr.themes.Soft(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONOSPACE
    )
    plain = {"block_title_background_fill": "transparent", "block_title_text_color": "*body_text_color"}
    plain |= {f"{key}_dark": value for key, value in plain.items()}
    return {"theme": theme.set(**plain, block_title_padding="0"), "css": CSS}


# ---- draw ----


def _subject(relay: Relay, seeds: str) -> dict[str, Any]:
    """Add the inputs that say what is drawn, by names of DrawOptions."""
    inputs = {}
    if relay.num_classes:
        inputs["chosen_class"] = gr.Dropdown([ALL, *class_names(relay), NO_CLASS], value=ALL, label="Class")
    if relay.text_dim:
        inputs["prompt"] = gr.Textbox(
            label="Prompt", placeholder="red apple, 3D style", lines=2, info="several lines: in turn by seed"
        )
        inputs["negative_prompt"] = gr.Textbox(label="Negative prompt", info="needs guidance other than 1")
    return inputs | {"seeds": gr.Textbox(seeds, label="Seeds", info="one image each: 0-7 or 3,14,15")}


def _class_of(choice: str | None) -> str | None:
    return {ALL: None, NO_CLASS: "-1"}.get(choice, choice) if choice is not None else None


def _stage_sliders(relay: Relay, steps: bool = True) -> dict[str, gr.Slider]:
    """Add the sliders of each stage; return them as "NAME.steps" and "NAME.guidance_scale"."""
    sliders: dict[str, gr.Slider] = {}
    for position, (name, stage) in enumerate(relay.chain().items()):
        if steps and (stored := stored_steps(stage)) is not None:
            sliders[f"{name}.steps"] = gr.Slider(1, max_steps(stage), stored, step=1, label=f"{name}: steps")
        if can_guide(stage):
            scale = stage.guidance_scale
            shown = FIRST_GUIDANCE if position == 0 and scale == 1 and stage.corruption.block == 1 else scale
            sliders[f"{name}.guidance_scale"] = gr.Slider(
                0, MAX_GUIDANCE, shown, step=0.1, label=f"{name}: guidance", info="1: none"
            )
    return sliders


def _settings(values: Mapping[str, Any]) -> dict[str, StageSettings]:
    """Convert values of `_stage_sliders` to settings."""
    given: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, option = key.rpartition(".")
        given.setdefault(name, {})[option] = value
    return {name: StageSettings(**options) for name, options in given.items()}


def _draw_options(studio: Studio, values: Mapping[str, Any], stages: Mapping[str, StageSettings]) -> DrawOptions:
    return DrawOptions(
        seeds=values["seeds"],
        chosen_class=_class_of(values.get("chosen_class")),
        prompt=values.get("prompt") or "",
        negative_prompt=values.get("negative_prompt") or "",
        stages=stages,
        max_images=studio.limits.max_images,
        batch_size=studio.limits.batch_size,
    )


def _draw_tab(studio: Studio) -> None:
    relay = studio.relay
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            subject = _subject(relay, f"0-{min(8, studio.limits.max_images) - 1}")
            sliders = _stage_sliders(relay)
            start, cancel = _buttons("Draw")
            status = _status()
        with gr.Column(scale=3):
            gallery = _gallery("drawn", "Images")
            _heading("From noise to image", "Noisy states above, the network's estimates of the images below.")
            picture = gr.Image(
                label="Trajectory", show_label=False, interactive=False, format="png", elem_id="trajectory",
                buttons=["download", "fullscreen"],
            )  # fmt: skip
            position = gr.Slider(1, 2, 1, step=1, label="Step", visible=False, elem_id="step")
            caption = gr.Markdown(elem_classes="caption")
    frames = gr.State([], time_to_live=KEPT_SECONDS)

    def run(*given: Any) -> Iterator[dict[Any, Any]]:
        values = dict(zip([*subject, *sliders], given, strict=True))
        options = _draw_options(studio, values, _settings({key: values[key] for key in sliders}))
        shown = None
        yield {
            gallery: [],
            picture: None,
            frames: [],
            position: gr.Slider(visible=False),
            caption: "",
            status: _progress(Job(), 0),
        }
        for job, seconds, drawing in _followed(studio, lambda job: draw(relay, options, job)):
            update: dict[Any, Any] = {status: _progress(job, seconds)}
            if job.preview is not shown:
                shown = update[picture] = job.preview
            if drawing is not None:
                last = len(drawing.frames)
                cost = " + ".join(map(str, drawing.evaluations.values()))
                done = f"{len(drawing.images)} images in {drawing.seconds:.1f} s; {cost} network evaluations each"
                update |= {
                    gallery: list(zip(drawing.images, drawing.captions, strict=True)),
                    picture: drawing.frames[-1].picture,
                    position: gr.Slider(1, last, last, step=1, visible=True),
                    caption: _describe(drawing.frames, last),
                    frames: drawing.frames,
                    status: _note(done),
                }
            yield update

    outputs = [gallery, picture, position, caption, frames, status]
    event = start.click(
        partial(_reported, run, status), [*subject.values(), *sliders.values()], outputs, api_name="draw", **EXCLUSIVE
    )
    _cancels(cancel, event, status)
    position.input(
        lambda number, recorded: (recorded[number - 1].picture, _describe(recorded, number)),
        [position, frames], [picture, caption],
        queue=False, show_progress="hidden", trigger_mode="always_last", api_visibility="private",
    )  # fmt: skip


def _describe(frames: Sequence[Frame], number: int) -> str:
    one = frames[number - 1]
    if one.sigma == 0:
        return f"stage **{one.stage}**: its result"
    return f"stage **{one.stage}**: evaluation {one.number} of {one.evaluations}, noise level {one.sigma:.3g}"


# ---- enlarge ----


def _enlarge_tab(studio: Studio) -> None:
    relays = studio.enlargers
    names = list(relays)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            most = f"{studio.limits.max_megapixels:g} megapixels"
            _heading("Image", f"PNG, JPEG or WebP; at most {most} when enlarged")
            image = gr.Image(
                label="Image", show_label=False, sources=["upload", "clipboard"], type="filepath", height=260,
                elem_id="image", buttons=[],
            )  # fmt: skip
            # gradio would open the file, and report damage in its own words
            image.preprocess = lambda payload: None if payload is None else payload.path
            model = gr.Radio(names, value=names[0], label="Relay", visible=len(names) > 1)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            start, cancel = _buttons("Enlarge")
            status = _status()
        with gr.Column(scale=3):
            _heading("Before and after", "Left: bicubic interpolation. Right: the relay. Drag the line between them.")
            slider = gr.ImageSlider(
                label="Before and after", show_label=False, interactive=False, format="png", elem_id="enlarged",
                max_height=760,
            )  # fmt: skip

    def run(path: str | None, chosen: str, number: int) -> Iterator[dict[Any, Any]]:
        if path is None:
            raise UserError("image: none was given; drop one, paste one, or click on the field")
        relay = relays[chosen]
        tensor = read_image(_uploaded(path), relay, studio.limits.max_megapixels)
        yield {status: _progress(Job(), 0)}
        for job, seconds, enlarged in _followed(studio, lambda job: enlarge(relay, tensor, number, job=job)):
            if enlarged is None:
                yield {status: _progress(job, seconds)}
            else:
                size = f"{enlarged.after.width}x{enlarged.after.height}"
                done = f"{size} in {enlarged.seconds:.1f} s; {enlarged.evaluations} network evaluations"
                yield {slider: (enlarged.before, enlarged.after), status: _note(done)}

    event = start.click(
        partial(_reported, run, status), [image, model, seed], [slider, status], api_name="enlarge", **EXCLUSIVE
    )
    _cancels(cancel, event, status)


def _uploaded(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        raise UserError("image: files are kept for an hour, and this one is gone; give it again") from None


# ---- compare ----


def _compare_tab(studio: Studio) -> None:
    relay = studio.relay
    chain = relay.chain()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            subject = _subject(relay, f"0-{min(4, studio.limits.max_images) - 1}")
            costs = {name: _cost_slider(name, stage) for name, stage in chain.items()}
            sliders = _stage_sliders(relay, steps=False)
            start, cancel = _buttons("Compare")
            status = _status()
        with gr.Column(scale=3):
            galleries = []
            for position, title in enumerate(SAMPLERS):
                _heading(title, SAMPLERS[title])
                galleries.append(_gallery(f"compared-{position}", title))
            gr.Markdown("Same seeds, classes, guidance and network evaluations.", elem_classes="caption")

    def run(*given: Any) -> Iterator[dict[Any, Any]]:
        values = dict(zip([*subject, *costs, *sliders], given, strict=True))
        options = _draw_options(studio, values, _settings({key: values[key] for key in sliders}))
        evaluations = {name: values[name] for name in costs}
        yield {gallery: [] for gallery in galleries} | {status: _progress(Job(), 0)}
        for job, seconds, results in _followed(studio, lambda job: compare(relay, options, evaluations, job)):
            if results is None:
                yield {status: _progress(job, seconds)}
                continue
            cost = " + ".join(map(str, evaluations.values()))
            took = ", ".join(f"{one.title}: {one.drawing.seconds:.1f} s" for one in results)
            shown = {
                gallery: list(zip(one.drawing.images, one.drawing.captions, strict=True))
                for gallery, one in zip(galleries, results, strict=True)
            }
            yield shown | {status: _note(f"{cost} network evaluations each. {took}")}

    event = start.click(
        partial(_reported, run, status), [*subject.values(), *costs.values(), *sliders.values()],
        [*galleries, status], api_name="compare", **EXCLUSIVE,
    )  # fmt: skip
    _cancels(cancel, event, status)


def _cost_slider(name: str, stage: DiffusionStage) -> gr.Slider:
    """Add a slider over odd numbers of network evaluations."""
    near = min(MAX_EVALUATIONS, max(LEAST_EVALUATIONS, stage.sampler.evaluations))
    return gr.Slider(LEAST_EVALUATIONS, MAX_EVALUATIONS, near + (near + 1) % 2, step=2, label=f"{name}: evaluations")


# ---- shared parts ----


def _heading(title: str, text: str = "") -> None:
    gr.Markdown(f"### {title}\n{text}", elem_classes="heading")


def _gallery(name: str, label: str) -> gr.Gallery:
    return gr.Gallery(
        label=label, show_label=False, columns=4, height="auto", object_fit="contain", format="png", interactive=False,
        elem_id=name, elem_classes="pictures", buttons=["download", "fullscreen"],
    )  # fmt: skip


def _buttons(action: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        start = gr.Button(action, variant="primary", elem_id=f"{action.lower()}-start", min_width=80)
        cancel = gr.Button("Cancel", variant="secondary", elem_id=f"{action.lower()}-cancel", min_width=80)
    return start, cancel


def _cancels(button: gr.Button, event: Any, status: gr.HTML) -> None:
    button.click(lambda: _note("cancelled"), None, status, cancels=[event], queue=False, show_progress="hidden",
                 api_visibility="private")  # fmt: skip


def _followed(studio: Studio, work: Callable[[Job], Result]) -> Iterator[tuple[Job, float, Result | None]]:
    """Run a job when the networks are free.

    Yields the job, its seconds so far, and its result, which is None before the end.
    """
    job, began = studio.new_job(), time.perf_counter()

    def locked() -> Result:
        with studio.lock:
            return work(job)

    for result in follow(locked, job):
        yield job, time.perf_counter() - began, result


def _reported(run: Callable[..., Iterator[dict[Any, Any]]], status: gr.HTML, *values: Any) -> Iterator[dict[Any, Any]]:
    """Yield the updates of `run`, or the message of a user error."""
    try:
        yield from run(*values)
    except UserError as error:
        yield {status: _alert(str(error))}
    except CancelledJobError:  # the app ends
        yield {status: _note("cancelled")}


def _status() -> gr.HTML:
    return gr.HTML(_note(""), elem_classes="status", container=False, padding=False)


def _progress(job: Job, seconds: float) -> str:
    if not job.total:
        return '<progress aria-label="progress"></progress><p>waiting for the networks</p>'
    left = f", {seconds / job.done * (job.total - job.done):.0f} s left" if job.done else ""
    return (
        f'<progress aria-label="progress" value="{job.done}" max="{job.total}"></progress>'
        f"<p>{job.done} of {job.total} network evaluations{left}</p>"
    )


def _note(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _alert(text: str) -> str:
    return f'<p role="alert">{html.escape(" ".join(text.split()))}</p>'
