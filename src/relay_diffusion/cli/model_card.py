"""Model card of a published relay: README.md with metadata for the Hugging Face Hub."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relay_diffusion import __version__
from relay_diffusion.checkpoints.diffusers_layout import INSTALL as INSTALL_DIFFUSERS
from relay_diffusion.checkpoints.diffusers_layout import PIPELINE_FILE
from relay_diffusion.checkpoints.hub import INSTALL, parse_short_address
from relay_diffusion.errors import UserError, require
from relay_diffusion.models.relay import Relay
from relay_diffusion.sampling.report import MEASURES
from relay_diffusion.utils.files import parse_json
from relay_diffusion.utils.messages import shorten
from relay_diffusion.utils.resolution import size_text

LIBRARY = "relay-diffusion"
LISTED_CLASSES = 20  # more are only counted


def read_metrics(path: str) -> dict[str, Any]:
    """Read a metrics.json of sample.py. Raises UserError naming the file."""
    try:
        content = dict(parse_json(Path(path).expanduser().read_text(encoding="utf-8")))
        values = [content[name] for name, _, _ in MEASURES if name in content]
        numbers = [*values, content["images"]]
        if not values or not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
            raise ValueError
        return content
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"metrics={path}: cannot be read; give the metrics.json of a run of sample.py mode=evaluate"
        ) from None


def check_measured(metrics: Mapping[str, Any], relay: Relay, option: str) -> None:
    """Raise UserError if the metrics are those of other weights.

    The metrics of existing images name no weights.
    """
    hashes = {stage.info.origin["sha256"] for stage in relay.chain().values()}
    for name, settings in _measured_stages(metrics).items():
        require(
            settings.get("sha256") in hashes,
            f"{option}: its stage {shorten(name)} had other weights; evaluate this relay, or leave metrics out",
        )


def model_card(
    relay: Relay,
    address: str,
    dtype: str,
    license: str,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
    picture: str | None = None,
    diffusers: bool = False,
) -> str:
    """Return the text of README.md.

    address: what load_relay takes. dtype: of the written weights. picture: name of a file beside README.md.
    diffusers: whether the relay is a custom pipeline of diffusers too.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=license or None,
        library_name=LIBRARY,
        pipeline_tag=_pipeline(relay),
        tags=[LIBRARY, "diffusion", *(["diffusers"] if diffusers else []), *tags],
        datasets=list(datasets) or None,
        metrics=None if metrics is None else [name for name, _, _ in MEASURES if name in metrics],
    )
    name = address.rpartition("/")[2].partition("@")[0]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"Images of {size_text(relay.size)} by [Relay Diffusion](https://arxiv.org/abs/2309.03350), made with "
        f"{LIBRARY} {__version__}.",
    ]
    if picture is not None:
        parts.append(f"![samples]({picture})")
    parts += [
        "## Use",
        f"In a clone of {LIBRARY}:",
        f"    {INSTALL}",
        "Then",
        f"```python\n{_example(relay, address)}\n```",
    ]
    if diffusers:
        parts += [
            f"With diffusers, in a clone of {LIBRARY}:",
            f"    {INSTALL_DIFFUSERS}",
            "Then",
            f"```python\n{_diffusers_example(relay, address)}\n```",
        ]
    if relay.text_dim:
        parts.append("Prompts need the text encoder of training; `load_relay(..., text_path=FOLDER)` gives its files.")
    parts += ["## Stages", _stages(relay, dtype), _classes(relay)]
    if metrics is not None:
        parts += ["## Evaluation", *_evaluation(metrics)]
    facts = "The weights are safetensors, the settings JSON. `load_relay` runs no code of this repository."
    if diffusers:
        facts += f" diffusers runs `{PIPELINE_FILE}`, which imports the library {LIBRARY}."
    parts += ["## Files", facts]
    return "\n\n".join(parts) + "\n"


def _pipeline(relay: Relay) -> str:
    if relay.start_size is not None:
        return "image-to-image"
    return "text-to-image" if relay.text_dim else "unconditional-image-generation"


def _example(relay: Relay, address: str) -> str:
    given = [
        ("start=images", relay.start_size is not None),  # [B,C,H,W] in [-1, 1]
        ("labels=0", relay.num_classes > 0),
        ('prompt="a red fox"', relay.text_dim > 0),
    ]
    arguments = ", ".join(["range(4)", *(text for text, needed in given if needed)])
    return (
        f"from relay_diffusion import load_relay\n\nrelay = load_relay({json.dumps(address)})\n"
        f'images = relay.sample({arguments})  # [B,C,H,W] in [-1, 1]\nrelay.to_pil(images)[0].save("image.png")'
    )


def _diffusers_example(relay: Relay, address: str) -> str:
    given = [
        ("image=image", relay.start_size is not None),
        ("class_labels=0", relay.num_classes > 0),
        ('prompt="a red fox"', relay.text_dim > 0),
    ]
    arguments = ", ".join([*(text for text, needed in given if needed), "seeds=range(4)"])
    hub, imported, folder = parse_short_address(address), "", json.dumps(address)
    if hub is not None:
        revision = "" if hub.revision is None else f", revision={json.dumps(hub.revision)}"
        imported = "from huggingface_hub import snapshot_download\n"
        folder = f"snapshot_download({json.dumps(hub.repository)}{revision})"
    return (
        f"from diffusers import DiffusionPipeline\n{imported}\nfolder = {folder}\n"
        "pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)\n"
        f'pipe({arguments}).images[0].save("image.png")'
    )


def _stages(relay: Relay, dtype: str) -> str:
    rows = [("stage", "size", "starts from", "parameters", "evaluations", "training images seen", "weights")]
    for name, stage in relay.chain().items():
        block = stage.corruption.block
        rows.append(
            (
                name,
                size_text(relay.sizes[name]),
                "noise" if block == 1 else f"images {block} times smaller",
                f"{sum(parameter.numel() for parameter in stage.denoiser.parameters()):,}",
                str(stage.sampler.evaluations),
                f"{stage.info.images_seen:,}",
                dtype,
            )
        )
    return _table(rows)


def _classes(relay: Relay) -> str:
    """Return the number of classes, and their names if they are few."""
    names = [shorten(name) for name in relay.class_names or ()]
    listed = f": {', '.join(names)}" if 0 < len(names) <= LISTED_CLASSES else ""
    return f"{relay.num_classes or 'No'} classes{listed}."


def _evaluation(metrics: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of a metrics.json, which somebody may have edited."""
    rows = [
        ("metric", "value"),
        *((label, format(metrics[key], form)) for key, label, form in MEASURES if key in metrics),
    ]
    facts = [f"{metrics['images']:,} images"]
    reference = _mapping(metrics, "reference").get("path")
    if reference is not None:
        facts.append(f"reference {shorten(Path(str(reference)).name)}")
    protocol = _mapping(_mapping(metrics, "evaluation"), "protocol").get("name")
    if protocol is not None:
        facts.append(f"protocol {shorten(protocol)}")
    for name, stage in _measured_stages(metrics).items():
        evaluations, scale = shorten(stage.get("network_evaluations")), shorten(stage.get("guidance_scale"))
        facts.append(f"{shorten(name)}: {evaluations} network evaluations, guidance scale {scale}")
    notes = [shorten(note, 300) for key in ("warnings", "departures") for note in metrics.get(key) or ()]
    return [_table(rows), "; ".join(facts) + ".", *notes]


def _measured_stages(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the settings of each stage; empty for existing images."""
    stages = _mapping(_mapping(metrics, "settings"), "stages")
    return {name: _mapping(stages, name) for name in stages}


def _mapping(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = node.get(key)
    return value if isinstance(value, Mapping) else {}


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
