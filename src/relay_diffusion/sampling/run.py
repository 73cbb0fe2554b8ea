"""Sample and evaluate images from a validated config."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from relay_diffusion.checkpoints.loading import build_chain, build_configured, relay_options
from relay_diffusion.data.class_choice import AS_REFERENCE, class_indices, labels_like_reference
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.decode import MODES
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.npz import write_adm_samples
from relay_diffusion.data.start_images import StartImages
from relay_diffusion.errors import UserError, prefix_errors
from relay_diffusion.metrics import Evaluator
from relay_diffusion.metrics.inception import check_channels
from relay_diffusion.models.relay import Relay
from relay_diffusion.networks.ops import report_slow_settings
from relay_diffusion.sampling.agreement import block_mean_error
from relay_diffusion.sampling.batches import PlanDataModule, rank_order
from relay_diffusion.sampling.callbacks.image_writer import ImageWriter
from relay_diffusion.sampling.callbacks.relay_picture import RelayPicture
from relay_diffusion.sampling.callbacks.sampling_progress import SamplingProgress
from relay_diffusion.sampling.callbacks.trajectory_picture import TrajectoryPicture
from relay_diffusion.sampling.evaluate import check_count, measure, measure_stored
from relay_diffusion.sampling.image_store import ImageStore
from relay_diffusion.sampling.options import (
    ReferenceOptions,
    SamplingOptions,
    chosen_stages,
    sampling_options,
)
from relay_diffusion.sampling.plan import Plan, plan_from_images, plan_from_noise
from relay_diffusion.sampling.prompts import chosen_prompts, describe_prompts, note_prompts, summary
from relay_diffusion.sampling.report import report
from relay_diffusion.sampling.tracking import log_results, sample_table
from relay_diffusion.training.callbacks.preemption import Preemption
from relay_diffusion.utils.distributed import on_rank_zero, started_ranks
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.messages import shorten, shown_path
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.quiet import quiet_libraries
from relay_diffusion.utils.resolution import MIN_SIDE, Size, exceeded_limits, size_text

MANY_CLASSES = 1000  # a longer list is stored as counts and a checksum
UNEVEN = 2  # ratio of class frequencies in the reference above which a note is printed


@quiet_libraries()
def sample(cfg: DictConfig) -> dict[str, Any]:
    """Sample the missing images, evaluate all if mode=evaluate, return the results."""
    options = sampling_options(cfg)
    if options.images is not None:
        images = open_image_set(options.images, option="images")
        evaluator = build_evaluator(cfg.metrics, options.reference, images.resolution)
        return measure_stored(options, build_trainer(cfg), images, evaluator)
    relay = build_relay(cfg.relay)
    if options.format == "zip" and relay.image_channels not in MODES:
        raise UserError(
            f"format=zip: a zip holds images of 1, 3 or 4 channels, not {relay.image_channels}; use npz=true instead"
        )
    plan = make_plan(options, relay)
    trainer = build_trainer(cfg)
    if not options.evaluate:
        return sample_relay(options, trainer, relay, plan)
    check_count(f"seeds={cfg.seeds}", len(plan.names), trainer.num_devices * trainer.num_nodes)
    evaluator = build_evaluator(cfg.metrics, options.reference, relay.size, relay.image_channels)
    return sample_relay(options, trainer, relay, plan, evaluator)


@quiet_libraries()
def sample_relay(
    options: SamplingOptions, trainer: L.Trainer, relay: Relay, plan: Plan, evaluator: Evaluator | None = None
) -> dict[str, Any]:
    """Sample the missing images of a plan; evaluate all with `evaluator`.

    The results also go to the loggers of `trainer`.
    """
    classes_are_default = options.classes is None and plan.start is None
    if evaluator is not None and trainer.is_global_zero and classes_are_default and options.reference.path is not None:
        _report_uneven_classes(options.reference, relay)
    with started_ranks(trainer, options.run_id, str(options.output), "output"):
        return _make_and_measure(options, trainer, relay, plan, evaluator)


def _make_and_measure(
    options: SamplingOptions, trainer: L.Trainer, relay: Relay, plan: Plan, evaluator: Evaluator | None
) -> dict[str, Any]:
    settings = run_settings(relay, plan, trainer)

    def look() -> tuple[ImageStore, list[int]]:
        store = ImageStore(options.output, _without_places(settings), options.png_compression, relay.image_channels)
        missing = [position for position, name in enumerate(plan.names) if name not in store]
        _read_start(plan, missing, relay)
        note_prompts(plan, relay, missing)
        if options.config:
            write_text(options.output / "config.yaml", options.config)
        option = "relay.stages.{}.changes.denoiser.network.channels_last"
        networks = {option.format(name): stage.denoiser.network for name, stage in relay.chain().items()}
        report_slow_settings(trainer.strategy.root_device, networks)
        return store, missing

    store, missing = on_rank_zero(trainer, look)
    results: dict[str, Any] = {"images": len(plan.names), "sampled_now": len(missing)}
    if plan.prompts is not None:
        results["prompts"] = summary(plan)
    if plan.negative_prompt.strip():
        results["negative_prompt"] = shorten(plan.negative_prompt)
    shown = range(len(plan.names))[: options.trajectory]
    todo = sorted({*missing, *shown})
    if todo:
        began, picture = time.perf_counter(), options.output / "relay.png"
        callbacks: list[Callback] = [ImageWriter(store, plan, missing), progress_bar(relay, plan, todo)]
        if options.picture and missing and plan.sizes is None:
            callbacks.append(RelayPicture(picture, count=options.picture))
            results["picture"] = shown_path(picture)
        if shown:
            callbacks.append(TrajectoryPicture(options.output, len(shown)))
            results["trajectory"] = shown_path(options.output / "trajectory.png") + " and .webp"
        order = rank_order(todo, len(shown), trainer.num_devices * trainer.num_nodes)
        _predict(trainer, relay, PlanDataModule(plan, order, options.batch_size, relay), callbacks)
        results["seconds_sampling"] = round(time.perf_counter() - began, 1)
    if relay.hand_over_sigma is not None:
        results["saved_evaluations"] = relay.saved_evaluations
    images = store.images(plan.names, relay.size)
    if plan.start is not None and trainer.is_global_zero:
        results["block_mean_error"] = block_mean_error(plan, images)
    if evaluator is not None:
        results |= measure(options, trainer, evaluator, images, {"settings": settings} | results, relay.rounding)
    if trainer.is_global_zero:
        results |= _keep(options, relay, plan, store)
        report(results)  # first, as a logger may fail
        table = partial(sample_table, relay, plan, images, options.picture)
        log_results(trainer.loggers, options, results, relay.chain(), table)
    return results


def build_trainer(cfg: DictConfig) -> L.Trainer:
    """Build the trainer and its loggers, which write to `output`.

    Raises UserError for an account that W&B refuses.
    """
    cfg = copy.deepcopy(cfg)
    cfg.run_dir = cfg.output
    loggers = instantiate(cfg.get("logger") or {}, _convert_="all").values()
    for logger in loggers:
        if hasattr(logger, "check_login"):
            logger.check_login()
    return cast(L.Trainer, instantiate(cfg.trainer, logger=list(loggers), _convert_="all"))


def progress_bar(relay: Relay, plan: Plan, todo: Sequence[int]) -> SamplingProgress:
    """Return the progress bar of a run.

    todo: positions that it samples. Add it after the ImageWriter, so that it closes after the last file.
    """
    if plan.sizes is None:
        return SamplingProgress(len(plan.names), done=len(plan.names) - len(todo))
    evaluations = [relay.evaluations(size) for size in plan.sizes]
    left = sum(evaluations[position] for position in todo)
    return SamplingProgress(sum(evaluations), done=sum(evaluations) - left, tiles=True)


def build_relay(settings: DictConfig) -> Relay:
    """Build a relay from its config.

    Stages are repeated relay.repeat times, as NAME, NAME_2 and so on. Raises UserError for a checkpoint that cannot be
    loaded.
    """
    stages = {}
    for name, stage in chosen_stages(settings).items():
        with prefix_errors(f"relay.stages.{name}"):
            stages[name] = build_configured(stage)
    repeat = settings.get("repeat", 1)
    repeated, options = dict(stages), relay_options(settings)
    for number in range(2, repeat + 1):
        repeated |= {f"{name}_{number}": stage for name, stage in stages.items()}
    if repeat > 1 and options["resolution"] is None:
        first, *others = repeated.values()
        factor = math.prod(stage.corruption.block for stage in others)
        size = first.size[0] * factor, first.size[1] * factor
        if limits := exceeded_limits(size):
            raise UserError(
                f"relay.repeat={repeat}: would enlarge to {size_text(size)}, but {limits}; use a smaller number"
            )
        options["resolution"] = list(size)
    trusted = next(iter(chosen_stages(settings).values())).get("trusted", [])
    return build_chain(repeated, options, trusted)


def build_evaluator(
    metrics: DictConfig, reference: ReferenceOptions, resolution: tuple[int, int], channels: int = 3
) -> Evaluator:
    """Build the evaluator for images [height, width] and check its reference."""
    check_channels(channels, "mode=evaluate")
    source = instantiate(metrics.reference)(
        path=reference.path,
        subset=reference.subset,
        resolution=resolution,
        channels=channels,
        option=reference.option,
    )
    source.check()  # report errors before sampling
    evaluator: Evaluator = instantiate(metrics.evaluator, reference=source, _convert_="all")
    return evaluator


def make_plan(options: SamplingOptions, relay: Relay) -> Plan:
    """Plan the images of a run. Raises UserError for invalid seeds, classes, prompts or starting images."""
    plan = _plan_without_text(options, relay)
    prompts = chosen_prompts(options, relay, plan.start)
    return replace(plan, prompts=prompts, negative_prompt=options.negative_prompt or "")


def _plan_without_text(options: SamplingOptions, relay: Relay) -> Plan:
    size, path = relay.start_size, options.start.path
    first = next(iter(relay.chain()))
    chosen = chosen_classes(options, relay)
    if size is None:
        if path is not None:
            raise UserError(f"relay.start={path}: the stage {first} starts from noise; remove relay.start")
        every = class_indices(None, relay.num_classes, relay.class_names)
        seeds = options.default_seeds if options.seeds is None else options.seeds
        return replace(plan_from_noise(seeds, chosen or every), classes=chosen)
    if path is None:
        raise UserError(
            f"relay.stages.{first} enlarges images of {size_text(size)}: give them with relay.start=FOLDER, ZIP or FILE"
        )
    start = _start_images(options, relay, size, labels=bool(relay.num_classes) and chosen is None)
    _check_classes(start, relay)
    plan = replace(plan_from_images(start, options.seeds, chosen), classes=chosen)
    if isinstance(start, ImageDataset) or (options.start.size is None and set(start.sizes) == {size}):
        return plan
    for option, given in (("npz", options.npz), ("save_trajectory", options.trajectory)):
        if given:
            raise UserError(
                f"{option}={given}: needs images of one size, and those of relay.start keep theirs; remove it, or add "
                "relay.start_size=input"
            )
    for seed in plan.seeds:
        _check_size(f"relay.start: {start.names[seed]!r} in {start.path}", start.sizes[seed], relay)
    return replace(plan, sizes=[start.sizes[seed] for seed in plan.seeds])


def _start_images(options: SamplingOptions, relay: Relay, size: Size, labels: bool) -> ImageDataset | StartImages:
    """Open the images of relay.start: averaged to `size`, or as they are.

    labels: read their classes. Raises UserError for relay.start_size=own and images that all have one size.
    """
    start, channels = options.start, relay.image_channels
    assert start.path is not None
    arrays = channels not in MODES or str(start.path).endswith(".npz")
    if start.size == "own" and arrays:
        raise UserError("relay.start_size=own: is for image files; those of an .npz have one size, so use input")
    if start.size != "input" and not (start.size is None and (options.evaluate or arrays)):
        return StartImages(start.path, start.subset, start.exif == "apply", channels, labels)
    averaged = ImageDataset(
        start.path,
        size,
        subset=start.subset,
        labels=labels,
        exif=start.exif,
        channels=channels,
        option="relay.start",
    )
    averaged.load()  # before threads read it
    return averaged


def _check_size(where: str, size: Size, relay: Relay) -> None:
    """Raise UserError for an image that is too small or large.

    Its size when enlarged counts.
    """
    if min(size) < MIN_SIDE:
        raise UserError(f"{where} is {size_text(size)}: must be at least {MIN_SIDE}x{MIN_SIDE}; remove it")
    *_, factor = relay.factors.values()
    enlarged = size[0] * factor, size[1] * factor
    if limits := exceeded_limits(enlarged):
        raise UserError(
            f"{where} is {size_text(size)}: would become {size_text(enlarged)}, but {limits}; crop or shrink it"
        )


def _read_start(plan: Plan, positions: list[int], relay: Relay) -> None:
    """Decode the starting images to report a damaged one before sampling."""
    if plan.start is not None:
        if relay.num_classes and plan.classes is None and not plan.start.class_names:
            print("note: relay.start has no classes (dataset.json): its images have none; class=NAME gives them one")
        chosen = [plan.seeds[position] for position in positions]
        for _ in map_in_order(plan.start.__getitem__, chosen):
            pass
        if turned := len(plan.start.turned & {plan.start.names[index] for index in chosen}):
            images = "1 image" if turned == 1 else f"{turned:,} images"
            remedy = "relay.start_exif=ignore keeps them as stored"
            print(f"note: EXIF orientation applied to {images} of relay.start; {remedy}")
        if not isinstance(plan.start, StartImages):
            return
        if composited := sorted(plan.start.composited):
            print(f"note: transparency is composited on white: {shorten(', '.join(composited))}")
        if damaged := sorted(plan.start.unprofiled):
            print(
                f"note: colors are not converted, because the ICC profile does not fit: {shorten(', '.join(damaged))}"
            )


def chosen_classes(options: SamplingOptions, relay: Relay) -> list[int] | None:
    """Resolve `class` to class indices, taken in turn.

    None if it is not set. Raises UserError for unknown classes.
    """
    chosen, reference = options.classes, options.reference
    if chosen is None:
        return None
    if chosen != AS_REFERENCE or AS_REFERENCE in relay.class_names or not relay.num_classes:
        return class_indices(chosen, relay.num_classes, relay.class_names)
    if reference.path is None:
        raise UserError(f"class={AS_REFERENCE}: {reference.option} is null; give reference=FOLDER or ZIP")
    return labels_like_reference(
        reference.path, reference.subset, relay.num_classes, relay.class_names, reference.option
    )


def _check_classes(start: ImageDataset | StartImages, relay: Relay) -> None:
    """Raise UserError for starting images with other classes than the model's."""
    names = start.class_names
    if len(names) > relay.num_classes or (names and relay.class_names and names != relay.class_names):
        raise UserError(
            f"relay.start={start.path} has other classes than the model: give class=NAME (or class=-1 for no class)"
        )


def _report_uneven_classes(reference: ReferenceOptions, relay: Relay) -> None:
    """Print a note if classes are uneven in the reference alone.

    Different class frequencies raise all distances.
    """
    assert reference.path is not None
    with suppress(UserError):  # a reference without classes or images
        labels = labels_like_reference(
            reference.path, reference.subset, relay.num_classes, relay.class_names, "reference"
        )
        counts = Counter(labels)
        if relay.num_classes and max(counts.values()) > UNEVEN * min(counts[k] for k in range(relay.num_classes)):
            print(
                "note: classes are sampled equally often, unlike in the reference: class=reference uses its frequencies"
            )


def run_settings(relay: Relay, plan: Plan, trainer: L.Trainer) -> dict[str, Any]:
    """Return all settings that the images depend on, except the seeds."""
    settings = relay.describe() | {
        "classes": _shown_classes(plan.classes),
        "precision": trainer.precision,
        "device": trainer.strategy.root_device.type,
    }
    if plan.prompts is not None:
        settings["text"] = describe_prompts(plan, relay)
    if plan.start is not None:
        if plan.sizes is not None or relay.evaluations(relay.start_size) > relay.evaluations():
            settings["tiles"] = relay.describe_tiles()
        labels = hashlib.sha256(str(plan.start.labels).encode()).hexdigest()
        settings["start"] = {
            "path": str(plan.start.path),
            "subset": plan.start.subset,
            "hash": plan.start.source_hash,
            "labels": labels,
        } | ({} if plan.sizes is None else {"size": "own"})
    return settings


def _predict(trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule, own: list[Callback]) -> None:
    """Predict with additional callbacks."""
    before, loggers = list(trainer.callbacks), trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks = [*before, *own, Preemption()]  # type: ignore[attr-defined]
    trainer.loggers = []  # Lightning would start and finish their runs
    try:
        trainer.predict(model, datamodule=data, return_predictions=False)
    finally:
        trainer.callbacks, trainer.loggers = before, loggers  # type: ignore[attr-defined]


def _keep(options: SamplingOptions, relay: Relay, plan: Plan, store: ImageStore) -> dict[str, Any]:
    """Write the class labels, the zip and the .npz; return the paths."""
    places, size = {}, relay.size
    if options.npz:
        file = options.output / "images.npz"
        labels = plan.labels if min(plan.labels) >= 0 else None
        batches = store.images(plan.names, size).batches(options.batch_size)
        write_adm_samples(file, batches, len(plan.names), size, labels, store.channels)
        places["npz"] = shown_path(file)
    if relay.num_classes or plan.prompts is not None:
        names = relay.class_names or [str(index) for index in range(relay.num_classes)]
        prompts = {name: plan.prompt(position) for position, name in enumerate(plan.names)}
        store.note_labels(dict(zip(plan.names, plan.labels, strict=True)), names, prompts)
    if options.format == "zip":
        store.pack()
    kept = [place for place in (store.folder, store.archive) if place.exists()]
    return places | {"folder": " and ".join(shown_path(place) for place in kept)}


def _without_places(node: Any) -> Any:
    """Remove paths from settings: the hash identifies a moved checkpoint."""
    if not isinstance(node, dict):
        return node
    return {key: _without_places(value) for key, value in node.items() if key not in ("file", "path")}


def _shown_classes(classes: list[int] | None) -> Any:
    """Shorten a long list of classes to counts and a checksum."""
    if classes is None or len(classes) <= MANY_CLASSES:
        return classes
    counts = {str(label): count for label, count in sorted(Counter(classes).items())}
    return {"counts": counts, "sha256": hashlib.sha256(str(classes).encode()).hexdigest()}
