"""Load stages and relays from checkpoints, training runs and exports."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relay_diffusion.checkpoints.encoders import load_text_encoder
from relay_diffusion.checkpoints.export import RELAY_FILE, RELAY_FORMAT
from relay_diffusion.checkpoints.hub import download, is_address, parse_address, parse_short_address
from relay_diffusion.checkpoints.reading import (
    check_fits,
    check_resumable,
    check_stored,
    find_checkpoint,
    find_stage,
    read_file,
    read_stage,
    stored_weights,
    wandb_record,
)
from relay_diffusion.checkpoints.targets import OWN_PACKAGE, check_targets, package_names, translate_targets
from relay_diffusion.errors import UserError, prefix_errors, require
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import DiffusionStage, StageInfo
from relay_diffusion.samplers import Sampler
from relay_diffusion.text.base import TextEncoder
from relay_diffusion.utils.files import CONF, file_sha256, parse_json
from relay_diffusion.utils.messages import did_you_mean, one_line, shorten
from relay_diffusion.utils.resolution import Resolution


class RelayFile(NamedTuple):
    """What relay.json says.

    place: path or address of the file; stages: paths or addresses; options: of Relay.
    """

    place: str
    stages: dict[str, str | Path]
    options: dict[str, Any]


def load_stage(
    path: str | Path,
    weights: str = "ema",
    changes: Mapping[str, Any] | None = None,
    guide: str | Path | None = None,
    trusted: Sequence[str] = (),
    sampler: Mapping[str, Any] | None = None,
) -> DiffusionStage:
    """Load a stage in eval mode from its checkpoint alone.

    `path`: a .ckpt file, the directory of a training run, or the folder of an export, which may be on the Hub:
    "hf://USER/NAME[@REVISION][/FOLDER]". `weights`: "ema" or "raw". `changes`: values of the stored stage config to
    replace, e.g. {"sampler": {"steps": 50}}; nulls change nothing; guidance_scale 1 disables guidance,
    guidance_interval [0, inf] removes a stored interval.
    `guide`: checkpoint of a weaker network of the same images for autoguidance, given as `path`.
    `trusted`: packages besides relay_diffusion whose classes the files may name, e.g. ["my_package"]; no other code
    that the files name is imported or called.
    `sampler`: class and arguments of a sampler that replaces the stored one, as in conf/sampler; `changes` must not
    change the latter. A sampler with a `corruption` gets that of the stage, with the values given here:

        load_stage(path, sampler={"_target_": "relay_diffusion.samplers.EDMSampler", "steps": 12})

    Raises UserError naming the file if it is missing, damaged or not trusted.
    """
    file = find_stage(path)
    checkpoint = read_stage(file)
    stored = {key: value for key, value in checkpoint["stage_config"].items() if key != "optimizer"}
    defaults = {"cuda_graphs": True, "label_dropout": 0.0}  # older files lack them
    config = changed_config(defaults | stored, changes, f"changes to the stage of {file}: ")
    if sampler is not None:
        if ignored := _without_nulls((changes or {}).get("sampler") or {}):
            raise UserError(
                f"changes.sampler={shorten(ignored)}: changes the stored sampler, which sampler replaces; set these "
                "values in sampler, or changes.sampler=null"
            )
        config["sampler"] = _replaced_sampler(sampler, config["corruption"], trusted)
    if config.get("guidance_scale", 1) == 1 and (changes or {}).get("guidance_interval") is not None:
        raise UserError(
            f"changes to the stage of {file}: guidance_interval needs a guidance_scale other than 1, e.g. 2"
        )
    empty = build_empty(config, file, trusted)
    if not isinstance(empty, DiffusionStage):
        raise UserError(f"{file} describes a {type(empty).__name__}, not a DiffusionStage")
    state = stored_weights(checkpoint, weights, file)
    check_fits(state, empty.denoiser, file)
    seen = int(checkpoint.get("images_seen", 0))
    origin = {"file": str(file), "sha256": file_sha256(file), "weights": weights, "images_seen": seen}
    arguments: dict[str, Any] = {}
    if guide is not None:
        weaker = load_stage(guide, weights, trusted=trusted)
        arguments["guide"], origin["guide"] = weaker, weaker.info.origin
    names = list(checkpoint.get("class_names", []))
    info = StageInfo(config, names, origin, seen, checkpoint.get("text"), wandb_record(checkpoint))
    stage = cast(DiffusionStage, build_stored(config, file, trusted, info=info, **arguments))
    stage.denoiser.load_state_dict(state)
    try:
        stage.guided_denoiser()
    except UserError as error:  # report invalid guidance before sampling
        raise UserError(f"{file}: {error}") from None
    return stage.eval()


def load_relay(
    source: str | Path | Mapping[str, str | Path],
    weights: str | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    trusted: Sequence[str] = (),
    samplers: Mapping[str, Mapping[str, Any]] | None = None,
    resolution: Resolution | None = None,
    text_path: str | None = None,
) -> Relay:
    """Load a relay from a folder, the Hub, conf/relay, or stage paths.

    `source`: a folder that holds relay.json, e.g. {"format": 1, "stages": {"base": {"path": "base"}, "relay": {"path":
    "relay"}}, "consistency": true}, with paths relative to it, stages in order and an optional `consistency` as of
    Relay; or such a folder on the Hub, "USER/NAME[@REVISION]" or "hf://USER/NAME[@REVISION][/FOLDER]"; or a name such
    as "emoji", which is built as `sample.py relay=emoji` does; or a mapping of stage names to paths for load_stage.
    `weights`: "ema" or "raw"; None: those of the choice, or "ema". `changes` and `samplers`: `changes` and `sampler` of
    load_stage for each stage by its name. `trusted`: as for load_stage. `resolution`: of the last stage's images, R or
    [height, width]; None: that of the choice, or as trained. `text_path`: folder or Hub name of the text encoder of
    the stages; None: as their checkpoints say.

        load_relay("demo/emoji", changes={"base": {"sampler": {"steps": 2}}})
        load_relay("demo/emoji", samplers={"base": {"_target_": "relay_diffusion.samplers.EDMSampler", "steps": 2}})

    Raises UserError naming the file or the stage, if it cannot be used.
    """
    where = ""
    options: dict[str, Any] = {}
    load: dict[str, Callable[..., DiffusionStage]]
    if isinstance(source, Mapping):
        load = {name: partial(load_stage, path) for name, path in source.items()}
    elif (found := find_relay(source)) is not None:
        where, options = f"{found.place}: ", found.options
        load = {name: partial(load_stage, path) for name, path in found.stages.items()}
    else:
        settings = _relay_choice(str(source))
        where, options = f"relay={source}: ", relay_options(settings)
        load = {str(name): partial(build_configured, stage) for name, stage in settings.stages.items()}
    for option, by_stage in (("changes", changes), ("samplers", samplers)):
        for name in by_stage or {}:
            if name not in load:
                raise UserError(
                    f"{option}.{name}: {where}the relay has no stage {name}; its stages are {', '.join(load)}"
                )
    stages = {}
    for name, load_named in load.items():
        arguments = {"changes": (changes or {}).get(name), "sampler": (samplers or {}).get(name)}
        given = {key: value for key, value in (arguments | {"weights": weights}).items() if value is not None}
        with prefix_errors(f"{where}stages.{name}"):
            stages[name] = load_named(**given, **({"trusted": trusted} if trusted else {}))
    options |= {} if resolution is None else {"resolution": resolution}
    options |= {} if text_path is None else {"text_path": text_path}
    return build_chain(stages, options, trusted)


def build_chain(stages: Mapping[str, DiffusionStage], options: Mapping[str, Any], trusted: Sequence[str] = ()) -> Relay:
    """Build a relay of stages and their text encoder.

    options: as of `relay_options`. Raises UserError for stages that do not fit together.
    """
    arguments = dict(options)
    encoder = _encoder_of(stages, arguments.pop("text_path", None), trusted)
    return Relay(stages, **arguments, encoder=encoder)


def _encoder_of(
    stages: Mapping[str, DiffusionStage], path: str | None, trusted: Sequence[str]
) -> Callable[[], TextEncoder] | None:
    """Return the function that builds the text encoder of stages; None: no checkpoint names one.

    It is built by the first prompt, because samples without text do not need it. Raises UserError for stages of
    different encoders, and for a path without stages that have text.
    """
    hashes = {name: stage.info.text["hash"] for name, stage in stages.items() if stage.info.text is not None}
    if not hashes:
        require(path is None, f"relay.text_path={path}: the checkpoints of this relay name no text encoder; remove it")
        return None
    first = next(iter(hashes))
    for name, found in hashes.items():
        require(
            found == hashes[first],
            f"relay.stages.{name} was trained with another text encoder than {first}: train both with the same one",
        )
    return partial(load_text_encoder, stages[first].info, path, trusted, option="relay.text_path")


def build_configured(settings: DictConfig, **arguments: Any) -> DiffusionStage:
    """Build a stage of a relay config. Raises UserError for a checkpoint that cannot be loaded."""
    try:
        return cast(DiffusionStage, instantiate(settings, _convert_="all", **arguments))
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def relay_options(settings: DictConfig) -> dict[str, Any]:
    """Return the arguments of Relay in a relay config, except the stages."""
    return {
        "resolution": settings.get("resolution"),  # older choices lack it
        "text_path": settings.get("text_path"),  # likewise
        "tile": settings.get("tile"),
        "overlap": settings.get("overlap"),
        "tile_batch": settings.get("tile_batch", 4),
        "hand_over_sigma": settings.hand_over_sigma,
        "rounding": settings.rounding,
        "postprocess": instantiate(settings.postprocess),
        "consistency": settings.get("consistency", False),  # relay files of before lack it
    }


def bundled_relays() -> list[str]:
    """Names of conf/relay that need no further paths, sorted."""
    return [name for name in _relay_names() if needs_no_paths(name)]


def needs_no_paths(name: str) -> bool:
    """Whether a choice of conf/relay has the path of each stage."""
    return name in _relay_names() and not OmegaConf.missing_keys(_composed_relay(name))


def _relay_names() -> list[str]:
    return sorted(file.stem for file in (CONF / "relay").glob("*.yaml"))


def _composed_relay(name: str) -> DictConfig:
    """Compose a choice of conf/relay, with its stages from `first` on."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = cast(DictConfig, compose("sample", overrides=[f"relay={name}"]).relay)
    if first := settings.get("first"):
        names = list(settings.stages)
        settings.stages = OmegaConf.masked_copy(settings.stages, names[names.index(first) :])
    return settings


def _relay_choice(name: str) -> DictConfig:
    """Compose a choice of conf/relay.

    Raises UserError for an unknown name or missing stage paths.
    """
    known = _relay_names()
    if name not in known:
        raise UserError(
            f"no relay at {name}: give a folder with {RELAY_FILE}, a choice of conf/relay ({', '.join(known)}), a name "
            "on the Hub (USER/NAME), or the path of each stage, e.g. load_relay({'base': PATH, 'relay': PATH}); "
            "load_stage loads a single stage"
        )
    settings = _composed_relay(name)
    if missing := sorted(OmegaConf.missing_keys(settings)):
        raise UserError(f"relay={name}: {missing[0]} has no value; give the path of each stage: load_relay({{...}})")
    return settings


def find_relay(source: str | Path) -> RelayFile | None:
    """Find relay.json in a folder or on the Hub; None: neither.

    source: as for load_relay. A local file or folder takes precedence over USER/NAME on the Hub. Raises UserError for a
    damaged relay.json, and for a repository that cannot be used.
    """
    address = parse_address(str(source)) if is_address(source) else None
    path = Path(source)
    file = path if path.name == RELAY_FILE else path / RELAY_FILE
    if address is None and file.is_file():
        stages, options = _read_relay(file)
        return RelayFile(str(file), {name: file.parent / stage for name, stage in stages.items()}, options)
    if address is None and isinstance(source, str) and not path.exists():
        address = parse_short_address(source)
    if address is None:
        return None
    with nullcontext() if is_address(source) else prefix_errors(f"no relay at {source}"):
        folder, commit = download(address, RELAY_FILE)
    stages, options = _read_relay(folder / RELAY_FILE)
    return RelayFile(str(address), {name: str(commit.inside(stage)) for name, stage in stages.items()}, options)


def _read_relay(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Read stage paths and options of Relay from relay.json."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if content["format"] != RELAY_FORMAT:
            raise UserError(
                f"{file} is a relay in format {shorten(content['format'])}: this version reads {RELAY_FORMAT}"
            )
        stages, options = content["stages"], {"consistency": content.get("consistency", False)}
        known = content.keys() - options.keys() == {"format", "stages"} and isinstance(options["consistency"], bool)
        if not known or any(stage.keys() != {"path"} for stage in stages.values()):
            raise ValueError
        if not all(isinstance(stage["path"], str) for stage in stages.values()):
            raise ValueError
        return {name: stage["path"] for name, stage in stages.items()}, options
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f'{file} cannot be read: must be {{"format": {RELAY_FORMAT}, "stages": {{NAME: {{"path": PATH}}, ...}}}}, '
            'and "consistency": true if wanted'
        ) from None


def read_checkpoint(path: str | Path, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Read a checkpoint to resume from, onto the CPU.

    trusted: as for load_stage. Raises UserError naming the file, and the first key or tensor that is wrong.
    """
    file = find_checkpoint(path)
    content = read_file(file)
    check_resumable(content, file)
    if "config" in content.get("run", {}):
        content["run"]["config"] = translate_targets(content["run"]["config"])
    described = _described(content["stage_config"], file, trusted)
    if described is not None:
        check_fits(content["state_dict"], described, file)
        if averaged := (content.get("ema") or {}).get("weights"):
            check_fits(averaged, cast(torch.nn.Module, described.denoiser), file, "EMA ")
    return content


def _described(config: Mapping[str, Any], file: Path, trusted: Sequence[str]) -> torch.nn.Module | None:
    """Build the stage of a stored config on the meta device.

    Returns None for untrusted classes: training builds its own config and compares the stored one with it.
    """
    try:
        stage = build_empty({key: value for key, value in config.items() if key != "optimizer"}, file, trusted)
    except UserError:
        return None
    if not isinstance(stage, torch.nn.Module):
        raise UserError(f"{file} describes a {type(stage).__name__}, not a stage: it is damaged")
    return stage


def check_loadable(
    stage_config: Mapping[str, Any], text: Mapping[str, Any] | None, trusted: Sequence[str], file: Path
) -> None:
    """Raise UserError unless checkpoints with these settings can be loaded.

    `stage_config`, `text`: as in StageInfo. `file`: name of the checkpoint, for messages. The optimizer may be of any
    package, because loading ignores it. The global random state does not change.
    """
    check_stored({"stage_config": dict(stage_config)} | ({} if text is None else {"text": dict(text)}), file)
    config = {key: value for key, value in stage_config.items() if key != "optimizer"}
    check_targets([config, text], (OWN_PACKAGE, *package_names(trusted)), file)


def build_stored(config: Mapping[str, Any], file: Path, trusted: Sequence[str] = (), **arguments: Any) -> Any:
    """Build the object of a stored config, with additional `arguments`.

    trusted: packages besides this one whose classes it may name. Raises UserError for a class of another package and
    for settings that the class refuses.
    """
    check_targets(config, (OWN_PACKAGE, *package_names(trusted)), file)
    try:
        factory = instantiate(OmegaConf.create(dict(config)), _convert_="all", _partial_=True)
        return factory(**arguments) if callable(factory) else factory  # the caller checks the type
    except Exception as error:  # classes of trusted packages raise any type
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"the stage of {file} cannot be built: {reason}") from None


def build_empty(config: Mapping[str, Any], file: Path, trusted: Sequence[str] = ()) -> Any:
    """Build the object on the meta device.

    A damaged file may describe a network of any size.
    """
    with torch.device("meta"):
        return build_stored(config, file, trusted)


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """Return a stored config with replaced values.

    `changes` has the structure of the config; nulls in it change nothing. Changes of the corruption also apply to that
    of the sampler, unless `changes` sets the latter. where: start of messages. Raises UserError for an unknown key and
    for a value of another type.
    """
    _check_changes(config, changes or {}, where)
    stored, given = OmegaConf.create(dict(config)), _without_nulls(changes or {})
    OmegaConf.set_struct(stored, True)
    copied = {}
    if "corruption" in given and "corruption" in (config.get("sampler") or {}):
        copied = {"sampler": {"corruption": given["corruption"]}}  # the sampler has a copy
    try:
        merged = OmegaConf.merge(stored, copied, given)
    except OmegaConfBaseException as error:
        raise UserError(f"{where.rstrip('.: ')}: {str(error).splitlines()[0]}") from None
    return cast(dict[str, Any], OmegaConf.to_container(merged))


def _check_changes(stored: Mapping[str, Any], changes: Mapping[str, Any], where: str, parent: str = "") -> None:
    """Raise UserError for an unknown key or a value of another type.

    A stored null accepts any value. `where`: start of messages.
    """
    for name, value in changes.items():
        before, key = stored.get(name), f"{parent}{name}"
        if value is not None and name not in stored:
            raise UserError(f"{where}{shorten(key)}: unknown key{did_you_mean(str(name), map(str, stored))}")
        if value is None or before is None:
            continue
        if name == "_target_" and value != before:
            raise UserError(f"{where}{key}={shorten(value)}: changes keep the class; give another sampler as sampler")
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            _check_changes(before, value, where, f"{key}.")
        elif _kind(before) != _kind(value):
            raise UserError(f"{where}{key}={shorten(value)} must be {_kind(before)}; stored is {shorten(before)}")


def _replaced_sampler(
    settings: Mapping[str, Any], corruption: Mapping[str, Any], trusted: Sequence[str]
) -> dict[str, Any]:
    """Return the settings of another sampler with the corruption of the stage.

    Raises UserError for an untrusted class and for an unknown argument.
    """
    if not isinstance(settings, Mapping) or not settings.get("_target_"):
        raise UserError(
            f"sampler={shorten(settings)}: must name its class as _target_; changes.sampler changes values of the "
            "trained sampler"
        )
    check_targets(settings, (OWN_PACKAGE, *package_names(trusted)), "sampler")
    known = inspect.signature(get_class(settings["_target_"])).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key in settings:
        if not (key in known or key == "_target_" or takes_any):
            raise UserError(f"sampler.{shorten(key)}: unknown key{did_you_mean(str(key), known)}")
    replaced = dict(settings)
    if "corruption" in known:
        replaced["corruption"] = changed_config(corruption, settings.get("corruption"), "sampler.corruption.")
    return replaced


def build_sampler(stage: DiffusionStage, settings: Mapping[str, Any], trusted: Sequence[str] = ()) -> Sampler:
    """Build another sampler for a loaded stage, which does not change.

    settings: as `sampler` of load_stage. Raises UserError for a stage without a config, and for settings that the
    sampler refuses.
    """
    require(stage.info.config is not None, "sampler: this stage was not loaded from a checkpoint; set stage.sampler")
    config = cast(dict[str, Any], stage.info.config)
    replaced = _replaced_sampler(settings, config["corruption"], trusted)
    try:
        return cast(Sampler, instantiate(OmegaConf.create(replaced), _convert_="all"))
    except Exception as error:  # classes of trusted packages raise any type
        raise UserError(f"sampler: {one_line(error.__cause__ or error)}") from None


def stored_sampler(stage: DiffusionStage) -> Mapping[str, Any] | None:
    """Return the config of a stage's sampler; None: it has none, or was replaced since."""
    config: Mapping[str, Any] | None = (stage.info.config or {}).get("sampler")
    return config if config is not None and stage.describe()["sampler"] is config else None


def with_steps(config: Mapping[str, Any], steps: int, option: str) -> Sampler:
    """Build a stored sampler with another number of steps.

    config: of `stored_sampler`. option: name in messages. Raises UserError for a number that it refuses.
    """
    changed = changed_config(config, {"steps": steps}, f"{option}: ")
    with prefix_errors(option):  # the package of a loaded sampler is trusted
        return cast(Sampler, build_stored(changed, Path("sampler"), [str(config["_target_"]).partition(".")[0]]))


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", dict: "a mapping"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), "a list")


def _without_nulls(changes: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in changes.items():
        if isinstance(value, Mapping):
            value = _without_nulls(value) or None
        if value is not None:
            kept[key] = value
    return kept
