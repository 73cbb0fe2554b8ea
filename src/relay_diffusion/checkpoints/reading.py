"""Find, read and check checkpoints and exports without running code in them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard, cast

import torch
from torch import Tensor

from relay_diffusion.checkpoints.export import EXPORT_STAGE, EXPORT_WEIGHTS, read_export
from relay_diffusion.checkpoints.hub import download, is_address, parse_address
from relay_diffusion.checkpoints.targets import translate_targets
from relay_diffusion.errors import UserError
from relay_diffusion.utils.messages import shorten

LAST, BEST = "last.ckpt", "best.ckpt"
PUBLISHED = (".pkl", ".pt")  # suffixes of files that convert_checkpoint exports
KEPT = "images-*.ckpt"  # earlier checkpoints; the images seen have twelve digits
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DEPTH = 20  # levels of nesting in a stored config
MAX_IMAGES_SEEN = 2**62
TRAINING = ("state_dict", "images_seen", "replaced_gradients", "optimizer_states", "loops", "pytorch-lightning_version")
KINDS = {  # types of the keys that only training reads
    "replaced_gradients": int,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "dealt": dict,  # data settings of earlier versions
    "run": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}
RUN_KINDS = {"config": dict, "derived": list, "devices": int, "images": int, "wandb": dict}  # of its key "run"


def find_checkpoint(path: str | Path) -> Path:
    """Find a checkpoint: the file itself, or the last one of a run directory.

    Raises UserError if none exists.
    """
    path = Path(path)
    candidates = [path] if not path.is_dir() else [path / LAST, path / "checkpoints" / LAST]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"no checkpoint at {path}: give a .ckpt file or the directory of a training run")


def read_file(file: Path) -> dict[str, Any]:
    """Read a checkpoint file: tensors and plain values only, on the CPU. Raises UserError naming the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols, and of types that are refused below
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch.load raises a dozen types for damaged files
        remedy = "give a checkpoint of train.py"
        if file.suffix in PUBLISHED:
            remedy = "convert a published file first: python -m relay_diffusion.cli.convert_checkpoint"
        raise UserError(
            f"{file} cannot be read as a checkpoint: it is damaged, no checkpoint, or holds more than tensors and "
            f"plain values; {remedy}"
        ) from None
    return _translated(check_stored(content, file))


def _translated(content: dict[str, Any]) -> dict[str, Any]:
    return content | {key: translate_targets(content[key]) for key in ("stage_config", "text") if key in content}


def find_stage(path: str | Path) -> Path:
    """Find the stage.json of an export, or else a checkpoint (find_checkpoint).

    An export on the Hub (hf://...) is downloaded.
    """
    if is_address(path):
        folder, _ = download(parse_address(str(path)), EXPORT_STAGE, EXPORT_WEIGHTS)
        return folder / EXPORT_STAGE
    path = Path(path)
    if (path / EXPORT_STAGE).is_file():
        return path / EXPORT_STAGE
    if (path / EXPORT_WEIGHTS).is_file():
        raise UserError(f"{path} is an incomplete export, {EXPORT_STAGE} is missing: export again")
    return find_checkpoint(path)


def read_stage(file: Path) -> dict[str, Any]:
    """Read a checkpoint or an export, on the CPU. Raises UserError naming the file.

    Keys: stage_config; state_dict (of the stage), ema (a dictionary with weights) or both; class_names, images_seen;
    text (of the encoder), if the stage has some.
    """
    return _translated(check_stored(read_export(file), file)) if file.name == EXPORT_STAGE else read_file(file)


def stored_weights(content: Mapping[str, Any], kind: str, file: Path) -> Mapping[str, Tensor]:
    """Return the state dict of a stored denoiser.

    `kind`: "ema" or "raw". Raises UserError if the weights are missing or not finite.
    """
    states = {
        "raw": {k.removeprefix("denoiser."): v for k, v in content.get("state_dict", {}).items()},
        "ema": content.get("ema", {}).get("weights"),
    }
    if kind not in states:
        raise UserError(f"weights is {kind!r}: use ema or raw")
    state = states[kind]
    if not state:
        raise UserError(f"{file} holds no {kind} weights: use weights={'raw' if kind == 'ema' else 'ema'}")
    check_finite(state, file)
    return cast(Mapping[str, Tensor], state)


def wandb_record(content: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the record of the W&B run that wrote a checkpoint.

    None without a run, and for a record of another form.
    """
    run = content.get("run")
    record = run.get("wandb") if isinstance(run, dict) else None
    return record if is_run_record(record) else None


def is_run_record(value: object) -> TypeGuard[dict[str, str]]:
    """Return whether a value is the `run_record` of a WandbRun."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in (*value, *value.values())):
        return False
    return {"id", "directory"} <= value.keys()


def check_stored(content: Any, file: Path) -> dict[str, Any]:
    """Check the type of every key of a checkpoint or export.

    Shapes are not checked. Returns the content. Raises UserError naming the file and the key.
    """
    if not isinstance(content, dict) or not isinstance(content.get("stage_config"), dict):
        raise UserError(
            f"{file} is not a checkpoint of a diffusion stage: it holds no stage_config; give a checkpoint of train.py"
        )
    _check_plain(content["stage_config"], "stage_config", file)
    if "state_dict" in content:
        _check_tensors(content["state_dict"], "state_dict", file)
    ema = content.get("ema", {})
    if not isinstance(ema, dict):
        _wrong(file, "ema", ema, "a dictionary with weights")
    if ema.get("weights") is not None:
        _check_tensors(ema["weights"], "ema.weights", file)
    names, seen = content.get("class_names", []), content.get("images_seen", 0)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _wrong(file, "class_names", names, "a list of names")
    if not isinstance(seen, int) or isinstance(seen, bool) or not 0 <= seen <= MAX_IMAGES_SEEN:
        _wrong(file, "images_seen", seen, "a number of images")
    if "text" in content:
        _check_text(content["text"], file)
    return content


def _check_text(text: Any, file: Path) -> None:
    """Require the config and the hash of a text encoder."""
    _check_plain(text, "text", file)
    complete = isinstance(text, dict) and text.keys() == {"encoder", "hash"}
    if not complete or not isinstance(text["encoder"], dict) or not isinstance(text["hash"], str):
        _wrong(file, "text", text, "a dictionary with the encoder and the hash of the text encoder")


def check_resumable(content: dict[str, Any], file: Path) -> None:
    """Raise UserError unless training can resume: the checkpoint is complete and finite."""
    for key in TRAINING:
        if key not in content:
            raise UserError(f"{file} lacks {key}: training cannot continue from it; use an earlier checkpoint")
    for key, kind in KINDS.items():
        value = content.get(key)
        if key in content and (not isinstance(value, kind) or isinstance(value, bool)):
            _wrong(file, key, value, f"a {kind.__name__}")
    _check_plain(content.get("dealt", {}), "dealt", file)
    _check_run(content.get("run", {}), file)
    states = content["optimizer_states"]
    if len(states) != 1 or not isinstance(states[0], dict) or {"state", "param_groups"} - states[0].keys():
        raise UserError(f"{file} does not hold the state of one optimizer: use an earlier checkpoint to continue")
    check_finite(content["state_dict"], file)
    check_finite((content.get("ema") or {}).get("weights") or {}, file, "ema ")
    moments = states[0]["state"]
    if not isinstance(moments, dict) or not all(isinstance(state, dict) for state in moments.values()):
        _wrong(file, "optimizer_states", moments, "a dictionary for each parameter")
    for number, state in moments.items():
        tensors = {f"{number}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        _check_tensors(tensors, "optimizer_states", file)
        check_finite(tensors, file, "optimizer state ")


def _check_run(run: dict[str, Any], file: Path) -> None:
    _check_plain(run, "run", file)
    for key, value in run.items():
        kind = RUN_KINDS.get(key, object)
        if not isinstance(value, kind) or isinstance(value, bool):
            _wrong(file, f"run.{shorten(key)}", value, f"a {kind.__name__}")
    for key in ("derived", "wandb"):
        part = run.get(key, {})
        for value in part.values() if isinstance(part, dict) else part:
            if not isinstance(value, str):
                _wrong(file, f"run.{key}", value, "text")


def check_finite(weights: Mapping[str, Tensor], file: Path, what: str = "") -> None:
    """Raise UserError naming the first tensor with NaN or infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{file} holds weights that are not finite, first in {what}{shorten(name)}: its training has failed, "
                "use an earlier checkpoint"
            )


def check_fits(weights: Mapping[str, Tensor], network: torch.nn.Module, file: Path, what: str = "") -> None:
    """Raise UserError unless names and shapes match a network (meta device allowed)."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [f"it lacks {name}" for name in expected if name not in stored]
    problems += [f"it also holds {shorten(name)}" for name in stored if name not in expected]
    problems += [
        f"{name} is {list(stored[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if stored.get(name, shape) != shape
    ]
    if problems:
        raise UserError(f"the {what}weights in {file} do not fit the network: {problems[0]}")


def _check_tensors(weights: Any, key: str, file: Path) -> None:
    """Require a dictionary of dense float tensors that store all elements."""
    if not isinstance(weights, dict):
        _wrong(file, key, weights, "a dictionary of tensors")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            _wrong(file, f"{key}[{shorten(name)}]", tensor, "a tensor")
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(
                f"{file} is damaged: {key}.{shorten(name)} must hold float numbers, not {tensor.dtype} {tensor.layout}"
            )
        # an expanded tensor may have any size
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{file} is damaged: {key}.{shorten(name)} has more elements than it stores; use an earlier checkpoint"
            )


def _check_plain(node: Any, key: str, file: Path, depth: int = 0) -> None:
    """Require text, numbers, lists and dictionaries, nested at most MAX_DEPTH deep."""
    if depth > MAX_DEPTH:
        raise UserError(f"{file} is damaged: {key[:60]}... is nested too deeply")
    if isinstance(node, dict):
        for name, value in node.items():
            if not isinstance(name, str):
                _wrong(file, f"{key}[{shorten(name)}]", value, "stored under a text key")
            _check_plain(value, f"{key}.{shorten(name)}", file, depth + 1)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            _check_plain(value, f"{key}[{index}]", file, depth + 1)
    elif node is not None and not isinstance(node, str | int | float):
        _wrong(file, key, node, "text, a number, a list or a dictionary")


def _wrong(file: Path, key: str, value: Any, wanted: str) -> NoReturn:
    raise UserError(f"{file} is damaged: {key} must be {wanted}, not {type(value).__name__} {shorten(value)}")
