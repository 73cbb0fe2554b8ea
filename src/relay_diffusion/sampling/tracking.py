"""Log the results of sampling to the run that trained the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from PIL import Image

from relay_diffusion.data.image_sets import ImageSet
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.sampling.options import SamplingOptions
from relay_diffusion.sampling.plan import Plan
from relay_diffusion.training.loggers import MetricsCSV, send_row
from relay_diffusion.utils.files import json_text, parse_json, write_text
from relay_diffusion.utils.pictures import image_grid
from relay_diffusion.utils.run_lock import is_locked

GROUP = "relay"
LOGGED = "log/logged.json"  # in the output: the results that each logger has


class Table(NamedTuple):
    """Table for loggers with `log_image_table`. Cells may be PIL images."""

    columns: list[str]
    rows: list[list[Any]]


def sample_table(relay: Relay, plan: Plan, images: ImageSet, count: int) -> Table:
    """Tabulate the first images: picture, name, seed, class and prompt."""
    columns = ["image", "name", "seed"]
    columns += ["class"] * bool(relay.num_classes) + ["prompt"] * (plan.prompts is not None)
    rows = []
    for position, image in enumerate(images.tensors(range(len(plan.names))[:count])):
        label = plan.labels[position]
        named = relay.class_names[label] if label >= 0 and relay.class_names else str(label)
        cells = {
            "image": image_grid(image[None], 1),
            "name": plan.names[position],
            "seed": plan.seeds[position],
            "class": named if label >= 0 else "none",
            "prompt": plan.prompt(position),
        }
        rows.append([cells[column] for column in columns])
    return Table(columns, rows)


def log_results(
    loggers: Sequence[Logger],
    options: SamplingOptions,
    results: Mapping[str, Any],
    stages: Mapping[str, DiffusionStage] | None = None,
    table: Callable[[], Table] | None = None,
) -> None:
    """Log metrics, picture, table and metrics.json. Call on rank 0.

    W&B gets them in the run that trained the last stage, or in a new run if it has none. The x-axis is the images seen
    by the last stage. A logger that has these results already gets nothing. stages: of the relay, by name; None:
    existing images were evaluated. table: makes the table of samples, which reads the images again.
    """
    *_, (name, last) = [("", None), *(stages or {}).items()]
    seen = 0 if last is None else last.info.images_seen
    values = {key: float(results[key]) for key in results.get("names", ["images"])}
    logged = _read_logged(options.output / LOGGED)
    row = {"images_seen": seen, **values}
    having = [logger for logger in loggers if json_text(logged.get(type(logger).__name__)) == json_text(row)]
    if names := ", ".join(type(logger).__name__ for logger in having if not isinstance(logger, MetricsCSV)):
        print(f"note: logged already: {names} (delete {options.output / LOGGED} to log the results again)")
    loggers = [logger for logger in loggers if logger not in having]
    if not loggers:
        return
    record = None if last is None else last.info.wandb
    runs: list[Any] = [logger for logger in loggers if hasattr(logger, "join")]
    if runs and record is not None and is_locked(record["directory"]):
        print(f"note: nothing is logged, as {record['directory']} is training: repeat the command when it has ended")
        return
    for logger in runs:
        if record is not None:
            logger.join(record)
        _ = logger.experiment  # an error leaves the other loggers without the row too
        if record is None:
            logger.log_hyperparams(OmegaConf.to_container(OmegaConf.create(options.config)))
            print(f"note: {name or options.images} has no W&B run: the results go to the new run {logger.version}")
        else:
            print(f"the results go to the W&B run {logger.version}, which trained {name}")
    send_row(loggers, GROUP, values, seen)
    shown = table() if table is not None and any(hasattr(logger, "log_image_table") for logger in loggers) else None
    _log_media(loggers, options, shown, seen)
    models = {key: (stage.info.wandb, stage.info.images_seen) for key, stage in (stages or {}).items()}
    known = {key: model for key, model in models.items() if model[0] is not None}
    for logger in loggers:
        if "numbers" in results and hasattr(logger, "log_evaluation"):
            logger.log_evaluation(options.output / "metrics.json", known, seen)
        logger.finalize("success")
        logged[type(logger).__name__] = row  # after all of it: a command that was killed logs it again
        write_text(options.output / LOGGED, json_text(logged))


def _read_logged(file: Path) -> dict[str, Any]:
    """Read the results that each logger has, by its class. Raises UserError for a damaged file."""
    try:
        logged = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(logged, dict):
            raise TypeError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise UserError(f"{file} cannot be read: delete it to log the results again") from None
    return logged


def _log_media(loggers: Sequence[Logger], options: SamplingOptions, table: Table | None, seen: int) -> None:
    """Log the picture of the relay and the table of samples."""
    path = options.output / "relay.png"
    for logger in loggers:
        if path.is_file() and hasattr(logger, "log_image"):
            with Image.open(path) as picture:
                logger.log_image(f"{GROUP}/picture", [picture], step=seen)
        if table is not None and table.rows and hasattr(logger, "log_image_table"):
            logger.log_image_table(f"{GROUP}/samples", table.columns, table.rows, step=seen)
