"""One-line messages for user errors of this package, Hydra and OmegaConf."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from relay_diffusion.config import compose
from relay_diffusion.errors import UserError
from relay_diffusion.utils.installed import install_command
from relay_diffusion.utils.messages import did_you_mean, override, shorten

RELAYS = (  # names in conf/relay, with their stages
    ("one_stage", ["base"]),
    ("two_stages", ["base", "relay"]),
    ("three_stages", ["base", "relay", "third"]),
)
PROMPT_KEYS = ("prompt", "negative_prompt")  # options that are texts of any characters


def caused_by_user(error: BaseException) -> bool:
    """Return whether an option or a file caused the error."""
    return isinstance(error, UserError | HydraException | OmegaConfBaseException | YAMLError)


def explain(error: BaseException, config: Path, words: Sequence[str] = ()) -> str:
    """Describe a user error in one line.

    config, words: yaml and arguments of the command, for suggestions of keys.
    """
    causes = list(_causes(error))
    users = next((cause for cause in causes if isinstance(cause, UserError)), None)
    unknown = next((cause for cause in causes if isinstance(cause, ConfigKeyError | AttributeError)), None)
    resolved = next((cause for cause in causes if isinstance(cause, OmegaConfBaseException)), None)
    prompt = _unquoted_prompt(error, words)
    if users is not None:
        text = str(users).rpartition("UserError: ")[2]  # drop the traceback of a data worker
    elif isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = str(error).rpartition("full_key: ")[2]
        cause = str(error.__cause__)
        named = cause.partition("=")[0].isidentifier()  # the message starts with an argument name
        text = f"{key}{'.' if named else ': '}{cause}"
    elif prompt is not None:
        text = _quoting(*prompt)
    elif isinstance(error, OverrideParseException):
        text = (
            f"{error.override}: options are KEY=VALUE, as seeds=0-7; brackets must close, and a value with spaces or "
            f"special characters needs quotes inside: \"KEY='VALUE'\""
        )
    elif isinstance(error, MissingConfigException) and error.missing_cfg_file in _config_names(words):
        text = f"--config-name={error.missing_cfg_file}: there is no such yaml file; remove it"
    elif isinstance(error, MissingConfigException) and error.missing_cfg_file:
        text = _unknown_choice(error.missing_cfg_file, list(error.options or []), config.parent)
    elif isinstance(unknown, OmegaConfBaseException) and unknown.full_key and isinstance(error, HydraException):
        name = str(unknown.full_key)
        known, group = _known_keys(config, words), name.partition(".")[0]
        if _is_group(config, group) and not any(key.partition(".")[0] == group for key in known):
            choices = sorted(path.stem for path in (config.parent / group).glob("*.yaml"))
            text = f"{name} is not an option without a choice of {group}: add {group}=NAME, one of {', '.join(choices)}"
        else:
            text = f"{name} is not an option{_nearest_key(name, known)}"
    elif resolved is not None and resolved.full_key:
        text = f"{resolved.full_key}: {str(resolved).splitlines()[0]}"
    elif isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        text = f"{mark.name}, line {mark.line + 1}: {error.problem}; correct the YAML"
    elif type(error) is ConfigCompositionException:
        text = _composition(error, config, words)
    elif isinstance(error, InterpolationKeyError):  # of an option that Hydra reads, such as run_dir
        name = str(error).partition("'")[2].partition("'")[0]
        word = next((word for word in words if f"${{{name}" in word), "")
        text = f"{word}: {name} is not an option; --help lists the options".removeprefix(": ")
    else:
        text = str(error)
    return " ".join(text.split())


def _config_names(words: Sequence[str]) -> list[str]:
    """List the values of --config-name and -cn."""
    joined = " ".join(words)
    return re.findall(r"(?:--config-name|-cn)[ =](\S+)", joined)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unquoted_prompt(error: BaseException, words: Sequence[str]) -> tuple[str, str] | None:
    """Return key and value of the prompt that Hydra cannot parse; None: of another error.

    Hydra reads commas as the values of a sweep.
    """
    for word in words:
        key, _, value = word.partition("=")
        refused = isinstance(error, OverrideParseException) and error.override == word
        swept = (
            type(error) is ConfigCompositionException and "Ambiguous value" in str(error) and f"'{word}'" in str(error)
        )
        if key in PROMPT_KEYS and (refused or swept):
            return key, value
    return None


def _composition(error: ConfigCompositionException, config: Path, words: Sequence[str]) -> str:
    """Describe an override with several values, or of an absent group."""
    text = str(error)
    several = next((word for word in words if text.startswith(f"Ambiguous value for argument '{word}'")), None)
    absent = re.match(r"Could not override '([^']+)'", text)
    if several is not None:
        key, _, value = several.partition("=")
        if _is_group(config, key):
            return f"{several}: is a list of choices; give one of them, or add --multirun to run a job for each"
        return (
            f'{several}: holds several values; write "{key}=[{value}]" for a list, "{key}=\'{value}\'" for a text, or '
            "add --multirun to run a job for each"
        )
    deleted = re.match(r"Could not delete from config\. '([^']+)' does not exist", text)
    if deleted is not None:
        return f"~{deleted.group(1)}: {deleted.group(1)} is not an option; --help lists the options"
    if absent is None:
        return f"{text} (--help lists the groups and options)"
    key = absent.group(1)
    word = next((word for word in words if word.partition("=")[0] == key), key)
    group, _, package = key.partition("@")
    if group == "sampler" and not package:
        return f"{word}: name the stage, as sampler@relay.stages.base.{word}"
    if "/" not in group and not package:
        return not_an_option(group, config)
    other = group.rpartition("/")[0] or package.partition(".")[0]
    return f"{word}: the chosen {other} has no group {key}; remove it, or choose another {other}"


def groups_of(main: DictConfig | ListConfig) -> list[str]:
    """List the groups in the defaults of a config, sorted."""
    entries = [str(group) for entry in main.defaults if isinstance(entry, DictConfig) for group in entry]
    return sorted(group for group in entries if not group.startswith("override "))


def not_an_option(key: str, config: Path) -> str:
    """Describe an unknown group, with the groups of the command."""
    groups = ", ".join(groups_of(OmegaConf.load(config)))
    return f"{key} is not an option of {config.stem}.py; its groups are {groups} (see --help)"


def _quoting(key: str, value: str) -> str:
    """Describe how to write a prompt with commas or other special characters."""
    text = " ".join(value.split()).strip("'\"")
    if value.startswith("["):
        example = f"\"{key}=['TEXT', 'TEXT']\", or prompts=FILE with a prompt in each line"
    elif set(text) & set('"`$\\!'):
        example = override(key, text)
    else:
        inner = text.replace("'", "\\'")
        example = f"\"{key}='{inner}'\""
    return f"{key}={shorten(value)}: a text with commas or special characters needs quotes inside; write {example}"


def _unknown_choice(choice: str, known: list[str], conf: Path) -> str:
    """Describe GROUP/NAME. The name may be a path, such as that of a published relay."""
    words = choice.split("/")
    parts = next((n for n in range(len(words) - 1, 0, -1) if conf.joinpath(*words[:n]).is_dir() and words[n - 1]), 1)
    group, name = "/".join(words[:parts]), "/".join(words[parts:])
    if group == "relay" and Path(name).is_dir() and (stages := _words_of_relay(name)):
        return f"relay={name}: is a folder, not a name of conf/relay; write {stages}"
    if group == "hydra/launcher" and name.startswith("submitit"):
        return f"{group}={name}: the launcher is not installed; {install_command('slurm')}"
    return f"unknown choice {group}={name}{did_you_mean(name, known)}"


def _words_of_relay(folder: str) -> str:
    """Return the overrides that sample a published relay.

    Empty for another folder.
    """
    from relay_diffusion.checkpoints.loading import find_relay  # imports PyTorch

    try:
        relay = find_relay(Path(folder))
    except UserError:
        return ""
    if relay is None or not 0 < len(relay.stages) <= len(RELAYS):
        return ""
    choice, names = RELAYS[len(relay.stages) - 1]
    if [*relay.stages] == ["relay"]:  # a single stage that enlarges images
        choice, names = "two_stages", ["relay"]
    paths = zip(names, relay.stages.values(), strict=True)
    words = [f"relay={choice}", *(override(f"relay.stages.{name}.path", str(path)) for name, path in paths)]
    return " ".join([*words, "relay.consistency=true"] if relay.options["consistency"] else words)


def _nearest_key(name: str, known: list[str]) -> str:
    """Suggest a key with the same or a similar last word.

    Similar keys must have the same parent, if it exists.
    """
    parent, _, last = name.rpartition(".")
    same = [key for key in known if key.rpartition(".")[2] == last]
    if same:
        return did_you_mean(name, same, f"; did you mean {same[0]}?")
    for beside in (True, False):
        keys = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent or not beside}
        if close := get_close_matches(last, keys, n=1):
            return f"; did you mean {keys[close[0]]}?"
        if parent in known:
            return f"; a new key is added with +{name}=VALUE"
    return "; --help lists the options"


def _known_keys(config: Path, words: Sequence[str]) -> list[str]:
    """List the keys of a config with the chosen groups."""
    chosen = [word for word in words if _is_group(config, word.lstrip("+").partition("=")[0])]
    try:
        cfg = compose(config.stem, chosen, config.parent)
    except (HydraException, OmegaConfBaseException, YAMLError):  # e.g. several choices for a sweep
        cfg = compose(config.stem, (), config.parent)
    return list(_keys(OmegaConf.to_container(cfg, resolve=False)))


def _is_group(config: Path, key: str) -> bool:
    return bool(key) and (config.parent / key.partition("@")[0]).is_dir()  # GROUP or GROUP@PACKAGE


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node if isinstance(node, dict) else ():
        if not str(key).startswith("_"):
            yield f"{prefix}{key}"
            yield from _keys(node[key], f"{prefix}{key}.")
