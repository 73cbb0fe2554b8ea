"""Check parts of the configuration against the constructors of their classes.

Names and types are compared with the signature. Constructors check ranges; they run on the meta device.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from relay_diffusion.config.checks import is_number, is_whole, selected
from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.messages import did_you_mean, shorten
from relay_diffusion.utils.signatures import check_arguments

KINDS = types.MappingProxyType(
    {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
)

META_HINT = (
    "loading first builds stages on the meta device, so a constructor that reads numbers of a tensor must make it with "
    "device='cpu'"
)


def check_types(cfg: DictConfig, key: str) -> None:
    """Check names and types of the options below `key`.

    They are compared with the signatures of the constructors. Raises UserError naming the option.
    """
    node = selected(cfg, key)
    if not isinstance(node, DictConfig):
        return
    for name in map(str, node):
        if not OmegaConf.is_interpolation(node, name):
            check_types(cfg, f"{key}.{name}")
    if "_target_" not in node:
        return
    target = _target(key, node._target_)
    options = [str(name) for name in node if not str(name).startswith("_")]
    try:
        parameters = inspect.signature(target).parameters
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (TypeError, ValueError, NameError):  # built in C, or annotations that only type checkers can import
        return
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in options:
        require(
            name in parameters or open_ended,
            f"{key}.{name}={shorten(node[name])}: _target_={shorten(node._target_)} has no such option"
            f"{did_you_mean(name, [known for known in parameters if known not in options], '')}",
        )
        if name in parameters and name in hints:
            _check_type(f"{key}.{name}", node[name], hints[name])


def check_hooks(cfg: DictConfig, key: str) -> None:
    """Check the class of a callback and the arguments of its hooks.

    They are compared with those of Lightning's Callback. Raises UserError naming the class or the hook.
    """
    from lightning.pytorch.callbacks import Callback  # keep --help fast

    target = _target(key, selected(cfg, key)._target_)
    if not inspect.isclass(target):
        return
    require(
        issubclass(target, Callback),
        f"{key}: {target.__name__} must be a subclass of lightning.pytorch.callbacks.Callback",
    )
    for name, hook in vars(Callback).items():
        method = getattr(target, name)
        if inspect.isfunction(hook) and method is not hook:
            needed = [one.name for one in inspect.signature(hook).parameters.values() if one.default is one.empty]
            if isinstance(inspect.getattr_static(target, name), staticmethod | classmethod):
                needed.remove("self")
            keywords = [argument for argument in needed if argument == "stage"]  # which Lightning gives by its name
            others = [argument for argument in needed if argument not in keywords]
            check_arguments(f"{key}: {target.__name__}.{name}", method, others, keywords)


def _target(key: str, name: str) -> Callable[..., Any]:
    found: Any = None
    path = ""
    option = f"{key}._target_={shorten(name)}"
    for part in name.split("."):
        module, path = path, f"{path}.{part}".lstrip(".")
        try:
            found = getattr(found, part) if module and hasattr(found, part) else importlib.import_module(path)
        except Exception as error:  # an import may raise any type
            if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
                where = f"there is no module {shorten(path)} (it must be on PYTHONPATH or beside train.py)"
                missing = f"{shorten(module)} has no {shorten(part)}{did_you_mean(part, dir(found), '')}"
                raise UserError(f"{option}: {missing if module else where}") from None
            raise UserError(f"{option}: cannot be imported ({shorten(error)})") from None
    require(callable(found), f"{option}: must be the full name of a class or function")
    return typing.cast(Callable[..., Any], found)


def _check_type(key: str, value: Any, hint: Any) -> None:
    hints = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if any(_fits(value, one) for one in hints):
        return
    remedy = f": write {value:.0f}" if int in hints and isinstance(value, float) and value.is_integer() else ""
    raise UserError(f"{key}={shorten(value)}: must be {_kind(hint)}{remedy}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a config value has the type of an annotation.

    A mapping with a `_target_` has the type of a class.
    """
    origin = typing.get_origin(hint) or hint
    if origin in (int, float, bool):
        fits: Callable[[Any], bool] = {int: is_whole, float: is_number, bool: lambda v: isinstance(v, bool)}[origin]
        return fits(value)
    if origin is type(None):
        return value is None
    if origin in (str, Path):  # YAML reads the name 5 as a number
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (list, tuple, Sequence):
        items = [item for item in typing.get_args(hint) if item is not Ellipsis]
        return isinstance(value, ListConfig) and all(not items or _item_fits(v, items) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, DictConfig)
    if inspect.isclass(origin) and origin is not object:
        return isinstance(value, DictConfig) and "_target_" in value
    return True


def _item_fits(value: Any, hints: list[Any]) -> bool:
    return any(_fits(value, one) for hint in hints for one in (typing.get_args(hint) or (hint,)))


def _kind(hint: Any) -> str:
    from torch import Tensor  # keep --help fast

    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        kinds = [one for one in typing.get_args(hint) if one is not Tensor]  # a config has no tensors
        return " or ".join(dict.fromkeys(map(_kind, kinds)))
    if origin is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if origin in (list, tuple, Sequence):
        items = " or ".join(f"{_kind(item)}" for item in typing.get_args(hint)[:1])
        return f"a list, each item {items}" if items else "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return KINDS.get(str if origin is Path else origin, "a mapping that names its class as _target_")


def check_call(key: str, function: Callable[..., Any], node: DictConfig) -> None:
    """Call a function with the options of `key` that it accepts.

    Raises UserError naming the option.
    """
    given = typing.cast(dict[str, Any], OmegaConf.to_object(node))
    options = {name: value for name, value in given.items() if name in inspect.signature(function).parameters}
    try:
        function(**options)
    except (TypeError, ValueError) as error:
        raise UserError(explain_option(key, error, options)) from None


class MetaBuilder:
    """Build parts of a config on the meta device, as a check.

    Each part is built once. Raises UserError naming an option that its constructor refuses.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self._built: dict[int, Any] = {}  # key: id of the node, equal for interpolations of it

    def build(self, key: str) -> Any:
        """Build the object of `key`, its parts first."""
        node = selected(self.cfg, key)
        if not isinstance(node, DictConfig):
            return OmegaConf.to_container(node) if isinstance(node, ListConfig) else node
        if id(node) not in self._built:
            self._built[id(node)] = self._build(key, node)
        return self._built[id(node)]

    def _build(self, key: str, node: DictConfig) -> Any:
        import torch  # keep --help fast

        options = {name: self.build(f"{key}.{name}") for name in map(str, node) if not name.startswith("_")}
        if "_target_" not in node:
            return options
        try:
            with torch.device("meta"):
                return instantiate(node, **options, _recursive_=False, _convert_="all")
        except InstantiationException as error:
            text = explain_option(key, error.__cause__ or error, options)
            hint = f"; {META_HINT}" if "meta tensor" in text else ""
            raise UserError(text + hint) from error


def explain_option(key: str, error: BaseException, options: Mapping[str, Any]) -> str:
    """Describe a constructor error in one line with the full key."""
    text = " ".join(str(error).split())
    name = text.partition("=")[0]
    if name in options:
        return f"{key}.{text}"
    if "." in name and all(part.isidentifier() for part in name.split(".")):  # the message starts with a full key
        return text
    plain = {k: v for k, v in options.items() if v is None or isinstance(v, str | int | float | list | ListConfig)}
    refused = [name for name, value in plain.items() if text.endswith(f": {value}")]  # torch ends with the value
    if len(refused) == 1:
        return f"{key}.{refused[0]}={shorten(plain[refused[0]], 30)}: {shorten(text, 200)}"
    given = ", ".join(f"{key}.{k}={shorten(v, 30)}" for k, v in plain.items())
    return f"{key}: {shorten(text, 200)}" + (f" (given: {shorten(given, 300)})" if given else "")
