"""Checks of a sample configuration before anything is built."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig

from relay_diffusion.checkpoints.targets import package_names
from relay_diffusion.config.checks import (
    HUGE,
    MAKE_DATA,
    check_built,
    check_checkpoint,
    check_choice,
    check_complete,
    check_devices,
    check_directory,
    check_file,
    check_flag,
    check_mapping,
    check_number,
    check_resolution,
    check_run_id,
    check_strategy,
    check_subset,
    check_whole,
    has_key,
    selected,
)
from relay_diffusion.config.parts import check_types
from relay_diffusion.errors import require
from relay_diffusion.sampling.options import chosen_stages, reference_of
from relay_diffusion.sampling.seeds import parse_seeds
from relay_diffusion.utils.messages import shorten
from relay_diffusion.utils.resolution import MAX_SIDE

MAX_REPEAT = 8  # of a relay: more enlarge by more than any image allows
MEASURING = ("metrics.reference", "metrics.evaluator")


def _check_relay(cfg: DictConfig) -> None:
    relay = cfg.relay
    for name in chosen_stages(relay):
        place = f"relay.stages.{name}"
        check_mapping(cfg, place)
        check_complete(relay.stages[name], prefix=f"{place}.")
        check_built(cfg, place)
        check_checkpoint(selected(cfg, f"{place}.path"), f"{place}.path")
        if has_key(cfg, f"{place}.weights"):  # optional: load_stage has a default
            check_choice(cfg, f"{place}.weights", ("ema", "raw"))
        guide, changes = selected(cfg, f"{place}.guide"), selected(cfg, f"{place}.changes")
        if guide is not None:
            check_checkpoint(guide, f"{place}.guide")
        if changes is not None:
            check_mapping(cfg, f"{place}.changes")
        sampler = selected(cfg, f"{place}.sampler")
        require(
            sampler is None or (isinstance(sampler, DictConfig) and "_target_" in sampler),
            f"{place}.sampler={shorten(sampler)}: write sampler@{place}.sampler=CHOICE, or name a class: "
            f"{place}.sampler={{_target_: CLASS, steps: 10}}",
        )
    check_subset(cfg, "relay.start_subset")
    check_choice(cfg, "relay.start_exif", ("apply", "ignore"))
    _check_enlarging(cfg)
    if relay.start is not None:
        check_file(relay.start, "relay.start")
    else:
        subset = relay.start_subset
        require(subset == "", f"relay.start_subset={shorten(subset)}: give relay.start=FOLDER or ZIP")
        exif = relay.start_exif
        require(exif == "apply", f"relay.start_exif={shorten(exif)}: give relay.start=FOLDER, ZIP or FILE")
    check_choice(cfg, "relay.rounding", ("nearest", "floor"))
    if has_key(cfg, "relay.consistency"):  # optional: Relay has a default
        check_flag(cfg, "relay.consistency")
    check_built(cfg, "relay.postprocess", null=True)
    path = selected(cfg, "relay.text_path")  # optional: older choices lack it
    require(path is None or isinstance(path, str), f"relay.text_path={shorten(path)}: must be the name of a folder")
    if relay.hand_over_sigma is not None:
        check_number(cfg, "relay.hand_over_sigma", 0, HUGE)
        require(relay.start is None, "relay.hand_over_sigma needs a stage that starts from noise: remove relay.start")
    if cfg.seeds is not None:
        parse_seeds(cfg.seeds)
    elif relay.start is None:
        parse_seeds(relay.seeds, "relay.seeds")


def _check_enlarging(cfg: DictConfig) -> None:
    """Check the options of enlarging.

    All keys are optional, as older choices lack them.
    """
    resolution, sized = selected(cfg, "relay.resolution"), selected(cfg, "relay.start_size")
    if resolution is not None:
        check_resolution(cfg, "relay.resolution")
    require(
        sized in (None, "own", "input"),
        f"relay.start_size={shorten(sized)}: use own, input or null (the images decide)",
    )
    if sized == "own":
        require(cfg.mode == "sample", "relay.start_size=own: mode=evaluate needs images of one size; use input")
        require(
            resolution is None,
            f"relay.resolution={shorten(resolution)}: images keep their size with relay.start_size=own; remove one",
        )
    if selected(cfg, "relay.tile") is not None:
        check_resolution(cfg, "relay.tile")
    if selected(cfg, "relay.overlap") is not None:
        check_whole(cfg, "relay.overlap", 1, MAX_SIDE)
    for key, most in (("relay.repeat", MAX_REPEAT), ("relay.tile_batch", 2**24)):
        if has_key(cfg, key):
            check_whole(cfg, key, 1, most)
    for key, default in (("start_size", None), ("tile", None), ("overlap", None), ("repeat", 1)):
        value = selected(cfg, f"relay.{key}", default)
        require(
            cfg.relay.start is not None or value == default,
            f"relay.{key}={shorten(value)}: give relay.start=FOLDER, ZIP or FILE",
        )


def _check_prompts(cfg: DictConfig) -> None:
    """Check the types of prompts; their content is checked before sampling."""
    for key in ("prompt", "negative_prompt"):
        given = cfg[key]
        entries = given if key == "prompt" and isinstance(given, ListConfig) else [given] * (given is not None)
        for entry in entries:
            require(
                isinstance(entry, str),
                f"{key} holds {shorten(entry)}, which is not a text: put quotes around it, as {key}=\"'TEXT'\"",
            )
    require(cfg.prompt is None or cfg.prompts is None, "prompt and prompts were given: remove one of them")
    if cfg.prompts is not None:
        check_file(cfg.prompts, "prompts")


def validate_sampling(cfg: DictConfig) -> None:
    """Check a sample config. Raises UserError for the first invalid option."""
    check_mapping(cfg, "metrics", "trainer", "relay", "relay.reference", "relay.stages")
    if has_key(cfg, "logger"):
        check_mapping(cfg, "logger")
    check_run_id(selected(cfg, "run_id"))
    check_complete(cfg, besides="relay.stages.")
    check_devices(cfg)
    check_whole(cfg, "batch_size", 1, 2**24)
    check_whole(cfg, "picture", 0, 10**6)
    drawn = cfg.save_trajectory
    require(
        isinstance(drawn, int) and 0 <= drawn <= 10**6,
        f"save_trajectory={shorten(drawn)}: use true, false or a number of images",
    )
    check_choice(cfg, "mode", ("sample", "evaluate"))
    check_choice(cfg, "format", ("png", "zip"))
    check_whole(cfg, "png_compression", 0, 9)
    check_flag(cfg, "npz")
    package_names(cfg.trusted)
    for key in ("run_dir", "output"):
        check_directory(cfg, key)
    if cfg.images is not None:
        require(cfg.mode == "evaluate", f"images={shorten(cfg.images)} are evaluated only: add mode=evaluate")
        for key in ("seeds", "class", "prompt", "prompts", "negative_prompt"):
            require(
                cfg[key] is None,
                f"{key}={shorten(cfg[key])} cannot be set: images={shorten(cfg.images)} are evaluated only",
            )
        require(
            cfg.format == "png" and not cfg.npz and not drawn,
            f"images={shorten(cfg.images)} are evaluated only; remove format, npz and save_trajectory",
        )
        require(cfg.reference is not None, f"images={shorten(cfg.images)}: give reference=FOLDER, ZIP or NPZ")
        check_file(cfg.images, "images")
    else:
        _check_relay(cfg)
        _check_prompts(cfg)
    measured = cfg.mode == "evaluate"
    if measured:
        _check_measuring(cfg)
    loggers = [f"logger.{name}" for name in cfg.get("logger") or ()]
    for key in loggers:
        check_built(cfg, key)
    for key in ("trainer", *loggers, *(MEASURING if measured else ())):  # last: importing their classes takes seconds
        check_types(cfg, key)
    check_strategy(cfg)


def _check_measuring(cfg: DictConfig) -> None:
    reference, key = reference_of(cfg), "relay.reference.path" if cfg.reference is None else "reference"
    require(
        reference["path"] is not None,
        "mode=evaluate compares with a reference, and relay.reference.path is null: give reference=FOLDER, ZIP or NPZ",
    )
    check_file(reference["path"], key, MAKE_DATA if cfg.reference is None else "")
    if cfg.reference is None and has_key(cfg, "relay.reference.subset"):
        check_subset(cfg, "relay.reference.subset")
    for key in MEASURING:
        check_built(cfg, key)
    check_directory(cfg, "metrics.reference.cache")
    check_whole(cfg, "metrics.reference.max_features", 0, 10**9)
    check_whole(cfg, "metrics.evaluator.batch_size", 1, 2**24)
    if has_key(cfg, "metrics.evaluator.inception.weights") and cfg.metrics.evaluator.inception.weights is not None:
        check_file(cfg.metrics.evaluator.inception.weights, "metrics.evaluator.inception.weights")
